"""Every row of the table: registrations, fakes, gradients, and equality with the naive loop and the specification."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from registrations import adapted_linear, adapted_linear_grads
from scatter_ops import reference
from tests.numerics import assert_exact
from tests.ops import naive
from tests.ops.cases import CASES, OPS, Case, Sizes, differentiable_inputs, map_tensors

BILINEAR = ("dispatch", "parallel_linear", "adapted_linear", "combine", "expand")
LARGER = Sizes(T=33, K=3, E=6, D=20, F=12)
EXACT = pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.float32), pytest.param("cuda", torch.float32, marks=pytest.mark.gpu)],
    ids=str,
)


def every(selected=lambda case: True):
    return pytest.mark.parametrize("case", [case for case in CASES if selected(case)], ids=str)


@every()
def test_opcheck(case: Case, device: str):
    torch.library.opcheck(getattr(OPS, case.op), case.arguments(device=device))


@every()
def test_fake_has_the_metadata_of_the_result(case: Case, device: str):
    arguments = case.arguments(device=device)
    real, _ = tree_flatten(getattr(OPS, case.op)(*arguments))
    with FakeTensorMode() as mode:
        fake, _ = tree_flatten(getattr(OPS, case.op)(*map_tensors(mode.from_tensor, arguments)))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@every(lambda case: case.differentiable and case.parameters != "expanded")
def test_gradients(case: Case):
    """By finite differences, which need float64; second derivatives too where the operator has them."""
    arguments = case.arguments(Sizes(T=3, K=2, E=4, D=3, F=2))
    inputs = [tensor for tensor in differentiable_inputs(arguments) if tensor.dtype == torch.float64]
    if not inputs or sum(tensor.numel() for tensor in inputs) == 0:
        return

    def function(*tensors):
        given = iter(tensors)
        replaced = map_tensors(lambda t: next(given) if t.requires_grad and t.dtype == torch.float64 else t, arguments)
        result = getattr(OPS, case.op)(*replaced)
        return result[0] if case.op == "mlp_forward" else result

    torch.autograd.gradcheck(function, inputs, fast_mode=True)
    if case.op in BILINEAR:
        torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every(lambda case: hasattr(naive, case.op))
@EXACT
def test_equals_the_naive_loop(case: Case, device: str, dtype: torch.dtype):
    """Outputs and all gradients against the loop in float64."""
    arguments = case.arguments(LARGER, dtype, device)
    wide = map_tensors(lambda t: t.detach().double().requires_grad_() if t.is_floating_point() else t, arguments)
    assert_exact(results(getattr(OPS, case.op), arguments), results(getattr(naive, case.op), wide), dtype)


@every(lambda case: case.op == "mlp")
@pytest.mark.parametrize("K", [1, 3, 6])
@EXACT
def test_mlp_of_one_token_without_gradients(case: Case, K: int, device: str, dtype: torch.dtype):
    """As the CPU generates text, with experts that have no biases."""
    with torch.no_grad():
        arguments = case.arguments(Sizes(T=1, K=K, E=6, D=20, F=12), dtype, device)
        arguments = (*arguments[:7], [], [], [], *arguments[10:])
        wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, arguments)
        assert_exact({"out": OPS.mlp(*arguments)}, {"out": naive.mlp(*wide)}, dtype)


@every(lambda case: case.op in ("mlp", "mlp_forward", "mlp_backward"))
def test_mlp_expert_by_expert(case: Case, monkeypatch: pytest.MonkeyPatch):
    """As the CPU takes many rows: one expert after the other, its activations in blocks of rows."""
    monkeypatch.setattr("scatter_ops.cpu.parts.MAPPED_BYTES", 0)
    monkeypatch.setattr("scatter_ops.cpu.parts.BLOCK_ELEMENTS", 100)
    test = test_equals_the_naive_loop if case.op == "mlp" else test_equals_the_reference
    test(case, "cpu", torch.float64)


@every(lambda case: case.op.startswith("adapted_linear"))
@pytest.mark.parametrize("by_sums", [False, True])
def test_adapted_linear_either_way(case: Case, by_sums: bool, monkeypatch: pytest.MonkeyPatch):
    """With each expert's sum, and with thin products alone."""
    for decision in ("_sums_take_less", "_whole_grads_take_less"):
        monkeypatch.setattr(f"scatter_ops.cpu.adapted_linear.{decision}", lambda *sizes: by_sums)
    test = test_equals_the_naive_loop if case.op == "adapted_linear" else test_equals_the_reference
    test(case, "cpu", torch.float64)


@every(lambda case: case.op == "adapted_linear")
def test_adapted_linear_of_three_products(case: Case):
    """As it runs on other devices than the CPU."""
    arguments = case.arguments(LARGER)
    expected = results(naive.adapted_linear, arguments)
    assert_exact(results(adapted_linear.by_thin_products, arguments), expected, torch.float64)


@every(lambda case: case.op == "adapted_linear_grads")
def test_adapted_linear_grads_of_four_products(case: Case):
    arguments = case.arguments(LARGER)
    with torch.no_grad():
        given, expected = adapted_linear_grads.by_thin_products(*arguments), reference.adapted_linear_grads(*arguments)
    assert_exact(dict(enumerate(given)), dict(enumerate(expected)), torch.float64)


@every(lambda case: case.op in ("mlp_backward", "parallel_linear_weight_grad", "expand_backward"))
def test_gradients_in_fresh_pages(case: Case, monkeypatch: pytest.MonkeyPatch):
    """As the CPU takes the memory of large gradients that most experts have no part in."""
    monkeypatch.setattr("scatter_ops.cpu.stacked.MAPPED_BYTES", 1)
    test_equals_the_reference(case, "cpu", torch.float64)


@every(lambda case: case.op == "route")
def test_routes_as_the_reference(case: Case, device: str):
    """But for the order in which an expert's slots come."""
    arguments = case.arguments(LARGER, device=device)
    (order, offsets), (expected_order, expected_offsets) = OPS.route(*arguments), reference.route(*arguments)
    assert torch.equal(offsets, expected_offsets)
    ends = offsets.tolist()
    for slots, expected in zip(order.tensor_split(ends), expected_order.tensor_split(ends), strict=True):
        assert torch.equal(slots.sort().values, expected)


@every(lambda case: case.op in reference.__all__ and case.op != "route")
@EXACT
def test_equals_the_reference(case: Case, device: str, dtype: torch.dtype):
    arguments = case.arguments(LARGER, dtype, device)
    with torch.no_grad():
        given, _ = tree_flatten(getattr(OPS, case.op)(*arguments))
        expected, _ = tree_flatten(getattr(reference, case.op)(*arguments))
    for a, b in zip(given, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_exact({case.op: a}, {case.op: b}, dtype)


def results(function, arguments, upstream_dtype=torch.bfloat16) -> dict[str, torch.Tensor | None]:
    """The output and the gradient of every input for a random upstream gradient of `upstream_dtype`."""
    out = function(*arguments)
    inputs = differentiable_inputs(arguments)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(upstream_dtype)
    grads = torch.autograd.grad(out, inputs, upstream.to(out.device, out.dtype), allow_unused=True)
    return {"output": out.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)}
