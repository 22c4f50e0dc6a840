"""Autocast does to the operators what it does to the naive code: linear layers are cast, routing and sums are not."""

import pytest
import torch
import torch.nn.functional as F

from tests.numerics import assert_exact
from tests.ops.cases import OPS, SCATTERED, SILU, Case, Sizes, differentiable_inputs, map_tensors

SIZES = Sizes(T=33, K=3, E=6, D=20, F=12)
LINEAR = Case("parallel_linear", bias=True, options=SCATTERED)
ADAPTED = Case("adapted_linear", bias=True, options=SCATTERED)
MLP = Case("mlp", parameters="list", bias=True, options=SILU)
UNTOUCHED = (
    Case("dispatch"),
    Case("combine", options={"grouped_in": True}),
    Case("combine", options={"grouped_in": True, "out_dtype": torch.float32}),
    Case("expand"),
)


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def autocast(request, device):
    return torch.autocast(device, dtype=request.param)


@pytest.mark.parametrize("case", [LINEAR, ADAPTED, MLP], ids=str)
def test_linear_layers_are_cast(case, autocast, device):
    """As if the caller had cast x, weights and biases; gradients come back in the parameters' own dtype."""
    dtype, function = autocast.fast_dtype, getattr(OPS, case.op)
    arguments = case.arguments(SIZES, torch.float32, device)
    with autocast:
        out = function(*arguments)
        assert out.dtype == F.linear(arguments[0], torch.ones_like(arguments[0])).dtype == dtype
    kept = arguments[1] if case is MLP else None
    expected = function(
        *map_tensors(lambda t: t.to(dtype) if t.is_floating_point() and t is not kept else t, arguments)
    )
    assert torch.equal(out, expected)
    inputs = differentiable_inputs(arguments)
    grads, expected_grads = (torch.autograd.grad(result.float().sum(), inputs) for result in (out, expected))
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in inputs]
    assert_exact(dict(enumerate(grads)), dict(enumerate(expected_grads)))


@pytest.mark.parametrize("case", UNTOUCHED, ids=str)
def test_moving_rows_is_left_alone(case, autocast, device):
    arguments = case.arguments(SIZES, torch.float32, device)
    expected = getattr(OPS, case.op)(*arguments)
    with autocast:
        assert torch.equal(getattr(OPS, case.op)(*arguments), expected)


@pytest.mark.parametrize("case", [LINEAR, MLP], ids=str)
def test_float64_is_left_alone(case):
    arguments = case.arguments(SIZES, torch.float64)
    with torch.autocast("cpu"):
        out = getattr(OPS, case.op)(*arguments)
        assert out.dtype == F.linear(arguments[0], torch.ones_like(arguments[0])).dtype == torch.float64
    assert torch.equal(out, getattr(OPS, case.op)(*arguments))


def test_out_dtype_is_kept(autocast, device):
    arguments = MLP.arguments(SIZES, torch.float32, device)
    with autocast:
        assert OPS.mlp(*arguments[:-1], torch.float32).dtype == torch.float32


def test_under_compile(autocast, device):
    torch._dynamo.reset()
    arguments = MLP.arguments(SIZES, torch.float32, device)

    def function(*given):
        with autocast:
            return OPS.mlp(*given)

    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments), function(*arguments))


def test_backward_inside_autocast(autocast, device):
    arguments = LINEAR.arguments(SIZES, torch.float32, device)
    with autocast:
        OPS.parallel_linear(*arguments).sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in differentiable_inputs(arguments))
