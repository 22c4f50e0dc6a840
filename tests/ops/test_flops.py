"""FLOP counts: those of the naive loop where every slot has an expert, an upper bound where there are sentinels."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from registrations.adapted_linear import by_thin_products
from tests.ops import naive
from tests.ops.cases import CASES, OPS, RANK, SCATTERED, SILU, Case, Sizes, _expert, differentiable_inputs
from tests.ops.test_autograd import frozen

SIZES = Sizes(T=33, K=3, E=6, D=20, F=12)
LINEAR = Case("parallel_linear", parameters="list", bias=True, options=SCATTERED)
MLPS = (
    Case("mlp", bias=True, options=SILU),
    Case("mlp", parameters="list", transposed=True, options=_expert("gelu", "separate")),
    Case("mlp", options=_expert("relu", "plain", weight_on="input")),
)


def count(function, arguments, inputs):
    with FlopCounterMode(display=False) as counter:
        out = function(*arguments)
        if inputs:
            torch.autograd.grad(out.sum(), inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", ["nothing", "x", "everything"])
@pytest.mark.parametrize("case", [LINEAR, *MLPS], ids=str)
def test_equal_to_the_naive_loop(case, trained, device):
    arguments = case.arguments(SIZES, device=device)
    if trained != "everything":
        for tensor in differentiable_inputs(arguments):
            tensor.requires_grad_(trained == "x" and tensor is arguments[0])
    inputs = differentiable_inputs(arguments)
    assert count(getattr(OPS, case.op), arguments, inputs) == count(getattr(naive, case.op), arguments, inputs) > 0


@pytest.mark.parametrize("trained", [[], [0], [2, 3], [0, 1, 2, 3]], ids=str)
def test_adapters_cost_what_thin_products_do(trained, device):
    """But that what is thin is not kept: x R^T, and dY L where x is trained too, are computed again for the factors."""
    arguments = frozen(Case("adapted_linear", bias=True, options=SCATTERED).arguments(SIZES, device=device), trained)
    inputs = differentiable_inputs(arguments)
    again = (SIZES.D if 2 in trained else 0) + (SIZES.F if 2 in trained and 0 in trained else 0)
    expected = count(by_thin_products, arguments, inputs) + 2 * SIZES.T * SIZES.K * RANK * again
    assert count(OPS.adapted_linear_forward, arguments, inputs) == expected > 0


def test_upper_bound_with_sentinels(device):
    case = Case("mlp", "sentinels", options=SILU)
    arguments = case.arguments(SIZES, device=device)
    inputs = differentiable_inputs(arguments)
    assert count(OPS.mlp, arguments, inputs) > count(naive.mlp, arguments, inputs)


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "mlp_backward_"], ids=str)
def test_backward_costs_the_same_in_place(case):
    arguments = case.arguments(SIZES)
    assert count(OPS.mlp_backward_, arguments, []) == count(OPS.mlp_backward, arguments, []) > 0
