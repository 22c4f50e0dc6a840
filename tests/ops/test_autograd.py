"""Derivatives outside the plain path: what is kept and computed, frozen parts, checkpoints, odd upstream gradients."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.numerics import assert_exact
from tests.ops.cases import OPS, RANK, SILU, Case, Sizes, differentiable_inputs, map_tensors
from tests.ops.test_table import results

SIZES = Sizes(T=33, K=3, E=6, D=20, F=12)
NUM_SLOTS = SIZES.T * SIZES.K
MLP = Case("mlp", bias=True, options=SILU)
LINEAR = Case("parallel_linear", bias=True, options={"grouped_in": False, "grouped_out": True})
ADAPTED = Case("adapted_linear", bias=True, options={"grouped_in": False, "grouped_out": True})
X, TOPK_WEIGHTS, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS = 0, 1, 4, 6, 7, 9


def frozen(arguments, trained):
    """Arguments of which only those at the positions `trained` require a gradient."""
    detached = map_tensors(torch.Tensor.detach, arguments)
    for position in trained:
        for tensor in detached[position] if isinstance(detached[position], list) else [detached[position]]:
            tensor.requires_grad_()
    return detached


class Recorder(TorchDispatchMode):
    """Names of the project's operators that ran."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "scatter_moe":
            self.calls.append((func.__name__.removesuffix(".default"), args))
        return func(*args, **(kwargs or {}))


def kept_shapes(function):
    """Shapes of the tensors that function keeps for backward."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return shapes


@pytest.mark.parametrize(
    ("trained", "keeps_h", "keeps_x"),
    [
        ([], False, False),
        ([X], True, False),
        ([TOPK_WEIGHTS], True, False),
        ([GATE_UP], True, True),
        ([DOWN], True, False),
        ([GATE_UP_BIAS], True, False),
        ([DOWN_BIAS], False, False),
        ([X, TOPK_WEIGHTS], True, False),
    ],
)
def test_mlp_keeps_and_computes_what_is_needed(trained, keeps_h, keeps_x, device):
    arguments = frozen(MLP.arguments(SIZES, device=device), trained)
    shapes = kept_shapes(lambda: OPS.mlp(*arguments))
    assert ((NUM_SLOTS, 2 * SIZES.F) in shapes) == keeps_h
    assert ((SIZES.T, SIZES.D) in shapes) == keeps_x
    assert ((NUM_SLOTS, SIZES.D) in shapes) == (TOPK_WEIGHTS in trained and device == "cpu")
    if not trained:
        return
    with Recorder() as recorder:
        given = results(OPS.mlp, arguments)
    (_, (*_, needs)) = next(call for call in recorder.calls if call[0] in ("mlp_backward", "mlp_backward_"))
    assert [i for i, need in enumerate(needs) if need] == [p if p < 2 else p - 2 for p in trained]
    everything = results(OPS.mlp, MLP.arguments(SIZES, device=device))
    names = {X: 0, TOPK_WEIGHTS: 1, GATE_UP: 2, DOWN: 3, GATE_UP_BIAS: 4, DOWN_BIAS: 5}
    expected = {f"gradient {i}": everything[f"gradient {names[p]}"] for i, p in enumerate(trained)}
    assert_exact(given, {"output": everything["output"]} | expected, torch.float64)


@pytest.mark.parametrize(
    ("trained", "backward_ops", "keeps"),
    [
        ([0], ["combine", "parallel_linear"], {(SIZES.E, SIZES.F, SIZES.D)}),
        ([1], ["parallel_linear_weight_grad"], {(SIZES.T, SIZES.D)}),
        ([7], ["parallel_linear_bias_grad"], set()),
    ],
)
def test_parallel_linear_keeps_and_computes_what_is_needed(trained, backward_ops, keeps, device):
    arguments = frozen(LINEAR.arguments(SIZES, device=device), trained)
    routing = {(NUM_SLOTS,), (SIZES.E,)}
    assert set(kept_shapes(lambda: OPS.parallel_linear(*arguments))) == keeps | routing
    out = OPS.parallel_linear(*arguments)
    with Recorder() as recorder:
        torch.autograd.grad(out.sum(), differentiable_inputs(arguments))
    assert sorted(name for name, _ in recorder.calls) == backward_ops


FACTORS = {(SIZES.E, SIZES.F, RANK), (SIZES.E, RANK, SIZES.D)}


@pytest.mark.parametrize(
    ("trained", "backward_ops", "keeps"),
    [
        ([0], ["adapted_linear_forward", "combine"], {(SIZES.E, SIZES.F, SIZES.D), *FACTORS}),
        ([1], ["parallel_linear_weight_grad"], {(SIZES.T, SIZES.D)}),
        ([2], ["adapted_linear_grads"], {(SIZES.T, SIZES.D), *FACTORS}),
        ([10], ["parallel_linear_bias_grad"], set()),
    ],
)
def test_adapted_linear_keeps_and_computes_what_is_needed(trained, backward_ops, keeps):
    arguments = frozen(ADAPTED.arguments(SIZES), trained)
    routing = {(NUM_SLOTS,), (SIZES.E,)}
    assert set(kept_shapes(lambda: OPS.adapted_linear(*arguments))) == keeps | routing
    out = OPS.adapted_linear(*arguments)
    with Recorder() as recorder:
        torch.autograd.grad(out.sum(), differentiable_inputs(arguments))
    assert sorted(name for name, _ in recorder.calls) == backward_ops
    if trained == [2]:
        assert recorder.calls[0][1][-2:] == (True, False)  # need_lhs, need_rhs


def test_one_frozen_expert_of_a_list(device):
    arguments = Case("mlp", parameters="list", options=SILU).arguments(SIZES, device=device)
    expected = results(OPS.mlp, arguments)
    arguments[DOWN][2].requires_grad_(False)
    OPS.mlp(*arguments).sum().backward()
    assert arguments[DOWN][2].grad is None
    assert arguments[DOWN][3].grad.shape == (SIZES.D, SIZES.F)
    assert expected.keys() != results(OPS.mlp, arguments).keys()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grouped_out", [False, True])
def test_results_can_be_written_to(grouped_out, bias, device):
    """Experts write to what a linear layer gave them: `y += x`."""
    case = Case("parallel_linear", bias=bias, options={"grouped_in": False, "grouped_out": grouped_out})
    arguments = case.arguments(Sizes(T=5, K=2, E=4, D=4, F=5), device=device)
    out = getattr(OPS, case.op)(*arguments)
    out.mul_(2.0)
    out.sum().backward()
    assert arguments[X].grad is not None


def test_gradients_of_a_list_can_be_changed_in_place(device):
    """They share one storage; clipping, zeroing and accumulating must not notice."""
    arguments = Case("mlp", parameters="list", options=SILU).arguments(SIZES, device=device)
    for _ in range(2):
        OPS.mlp(*arguments).sum().backward()
    doubled = [weight.grad.clone() for weight in arguments[DOWN]]
    torch.nn.utils.clip_grad_norm_(arguments[DOWN], 1e-3)
    torch.optim.SGD(arguments[DOWN], 0.1).zero_grad(set_to_none=False)
    OPS.mlp(*arguments).sum().backward()
    assert_exact(
        {str(e): 2 * weight.grad for e, weight in enumerate(arguments[DOWN])},
        {str(e): grad for e, grad in enumerate(doubled)},
        torch.float64,
    )


@pytest.mark.parametrize("case", [MLP, LINEAR, ADAPTED, Case("combine", options={"grouped_in": True})], ids=str)
@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_upstream_gradients_of_any_strides(case, upstream, device):
    arguments = case.arguments(SIZES, device=device)
    out = getattr(OPS, case.op)(*arguments)
    dense = torch.randn(out.shape[::-1], dtype=out.dtype, device=device).t()
    grad = dense[:1, :1].expand(out.shape) if upstream == "expanded" else dense
    inputs = differentiable_inputs(arguments)
    given = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    expected = torch.autograd.grad(out, inputs, grad.contiguous())
    assert_exact(dict(enumerate(given)), dict(enumerate(expected)), torch.float64)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", [MLP, LINEAR], ids=str)
def test_activation_checkpointing(case, use_reentrant, device):
    arguments = case.arguments(SIZES, device=device)
    function = getattr(OPS, case.op)
    if use_reentrant:
        given = reentrant(function, arguments)
    else:
        given = results(lambda *a: checkpoint(function, *a, use_reentrant=False), arguments)
    assert_exact(given, results(function, arguments), torch.float64)


def reentrant(function, arguments):
    """Results through reentrant checkpointing, which sees no tensors in lists and wants backward()."""
    inputs = differentiable_inputs(arguments)

    def flat(*tensors):
        given = iter(tensors)
        return function(*map_tensors(lambda t: next(given) if t.requires_grad else t, arguments))

    out = checkpoint(flat, *inputs, use_reentrant=True)
    out.backward(
        torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.device, out.dtype)
    )
    return {"output": out.detach()} | {f"gradient {i}": tensor.grad for i, tensor in enumerate(inputs)}


def test_second_derivatives_of_mlp_are_refused(device):
    arguments = MLP.arguments(SIZES, device=device)
    (grad,) = torch.autograd.grad(OPS.mlp(*arguments).sum(), arguments[X], create_graph=True)
    with pytest.raises(RuntimeError, match="scatter_moe::mlp has no second derivatives: write the expert with"):
        grad.sum().backward()


@pytest.mark.parametrize("case", [MLP, LINEAR, ADAPTED, Case("combine", options={"grouped_in": True})], ids=str)
def test_forward_mode_is_refused(case, device):
    """Instead of giving an output without a tangent. Where reverse mode records, PyTorch itself refuses."""
    x, *rest = frozen(case.arguments(SIZES, device=device), ())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative: got a tensor"):
        getattr(OPS, case.op)(forward_ad.make_dual(x, torch.ones_like(x)), *rest)


def test_save_h_is_required_for_backward(device):
    with pytest.raises(ValueError, match="save_h: got False, accepted is True"):
        OPS.mlp_forward(*MLP.arguments(SIZES, device=device), False, False)


def test_what_is_kept_is_not_differentiable(device):
    out, h, y = OPS.mlp_forward(*MLP.arguments(SIZES, device=device), True, True)
    assert out.requires_grad
    assert not h.requires_grad
    assert not y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(mode, device):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = MLP.arguments(SIZES, dtype, device)
        with mode():
            out = OPS.mlp(*arguments)
        assert not out.requires_grad
        assert torch.equal(out, OPS.mlp(*arguments).detach())


def test_functional_call(device):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros_like(w)) for w in arguments[DOWN]])

        def forward(self, *given):
            return OPS.mlp(*given[:DOWN], list(self.down), *given[DOWN + 1 :])

    arguments = Case("mlp", parameters="list", options=SILU).arguments(SIZES, device=device)
    parameters = {f"down.{e}": weight for e, weight in enumerate(arguments[DOWN])}
    given = results(lambda *a: torch.func.functional_call(Experts(), parameters, a), arguments)
    assert_exact(given, results(OPS.mlp, arguments), torch.float64)


def test_results_repeat_bitwise(device):
    arguments = MLP.arguments(SIZES, torch.float32, device)
    once, again = results(OPS.mlp, arguments), results(OPS.mlp, arguments)
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_expert_without_tokens_has_an_exactly_zero_gradient(device):
    arguments = Case("mlp", "one expert", options=SILU).arguments(SIZES, torch.float32, device)
    OPS.mlp(*arguments).sum().backward()
    assert all(torch.count_nonzero(arguments[p][0].grad[:-1]) == 0 for p in (GATE_UP, DOWN))
    assert all(torch.count_nonzero(arguments[p][0].grad[-1]) > 0 for p in (GATE_UP, DOWN))


def test_sentinels_contribute_nothing_whatever_their_rows_hold(device):
    y, topk_weights, order, offsets, top_k, *_ = Case("combine", "sentinels", options={"grouped_in": True}).arguments(
        SIZES, device=device
    )
    clean = OPS.combine(y, topk_weights, order, offsets, top_k, True)
    with torch.no_grad():
        y[int(offsets[-1]) :] = float("nan")
        topk_weights.view(-1)[order[int(offsets[-1]) :].long()] = float("nan")
    dirty = OPS.combine(y, topk_weights, order, offsets, top_k, True)
    assert torch.equal(clean, dirty)
    grad_y, grad_weights = torch.autograd.grad(dirty.sum(), [y, topk_weights])
    assert grad_y.isfinite().all()
    assert grad_weights.isfinite().all()


def test_mlp_backward_marks_h_as_changed(device):
    arguments = Case("mlp_backward_", options=SILU).arguments(SIZES, device=device)
    version = arguments[1]._version
    OPS.mlp_backward_(*arguments)
    assert arguments[1]._version > version
