"""Nothing is kept or computed for a gradient that nobody needs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scatter_moe import Dispatch, ExpertMLP, ParallelLinear
from tests.layers.cases import WIDTH, D, E, K, T, routed_inputs

N = T * K


class Ops(TorchDispatchMode):
    """Counts the operators of this library that run."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}
        self.needs: list[bool] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "scatter_moe":
            self.calls[name] = self.calls.get(name, 0) + 1
            self.needs = args[-1] if name.startswith("mlp_backward") else self.needs
        return func(*args, **(kwargs or {}))


def kept(call, *parameters):
    """Shapes of the floating-point tensors that are kept for backward, parameters apart, and what backward runs."""
    saved = []

    def pack(tensor):
        if tensor.is_floating_point() and not any(tensor is parameter for parameter in parameters):
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    with Ops() as ops:
        if out.requires_grad:
            out.sum().backward()
    return saved, ops


def mlp_and_inputs(x_grad=True, weights_grad=True, trained=("gate_up_proj", "down_proj")):
    layer = ExpertMLP(E, D, WIDTH, bias=True).requires_grad_(False)
    for name in trained:
        getattr(layer, name).requires_grad_(True)
    x, topk_ids, topk_weights = routed_inputs(0)
    x, topk_weights = x.float().requires_grad_(x_grad), topk_weights.float().requires_grad_(weights_grad)
    return layer, (x, topk_ids, topk_weights)


H, Y, X, S = (N, 2 * WIDTH), (N, D), (T, D), (T, K)


@pytest.mark.parametrize(
    ("options", "shapes", "needs"),
    [
        ({}, {H, Y, X, S}, [1, 1, 1, 0, 1, 0, 0, 0]),
        ({"trained": ()}, {H, Y, S}, [1, 1, 0, 0, 0, 0, 0, 0]),
        ({"trained": (), "x_grad": False}, {H, Y, S}, [0, 1, 0, 0, 0, 0, 0, 0]),
        ({"trained": (), "weights_grad": False}, {H, S}, [1, 0, 0, 0, 0, 0, 0, 0]),
        ({"x_grad": False, "weights_grad": False}, {H, X, S}, [0, 0, 1, 0, 1, 0, 0, 0]),
        ({"trained": ("down_proj",), "x_grad": False, "weights_grad": False}, {H, S}, [0, 0, 0, 0, 1, 0, 0, 0]),
        ({"trained": ("down_proj_bias",), "x_grad": False, "weights_grad": False}, {S}, [0, 0, 0, 0, 0, 0, 0, 1]),
        ({"trained": (), "x_grad": False, "weights_grad": False}, set(), None),
    ],
    ids=["all", "frozen experts", "router alone", "x alone", "experts alone", "down alone", "down bias", "nothing"],
)
def test_expert_mlp_keeps_what_is_needed(options, shapes, needs):
    layer, inputs = mlp_and_inputs(**options)
    saved, ops = kept(lambda: layer(*inputs), *layer.parameters())
    assert set(saved) == shapes and len(saved) == len(shapes)
    assert ops.needs == (None if needs is None else [bool(need) for need in needs])


def test_expert_mlp_keeps_nothing_without_grad_mode():
    layer, inputs = mlp_and_inputs()
    with torch.no_grad():
        saved, _ = kept(lambda: layer(*inputs))
    assert saved == []


def test_rows_that_are_grouped_already_have_no_router_gradient():
    layer, (x, *_) = mlp_and_inputs()
    counts = torch.full((E,), T // E)
    saved, ops = kept(lambda: layer.forward_grouped(x, counts), *layer.parameters())
    assert sorted(saved) == sorted([(T, 2 * WIDTH), X, (T, 1)])
    assert ops.needs is not None and ops.needs[:2] == [True, False]


@pytest.mark.parametrize(
    ("x_grad", "weight_grad", "bias_grad", "calls"),
    [
        (True, False, False, {"parallel_linear": 1, "combine": 1}),
        (False, True, False, {"parallel_linear_weight_grad": 1}),
        (False, False, True, {"parallel_linear_bias_grad": 1}),
    ],
    ids=["x", "weight", "bias"],
)
def test_parallel_linear_keeps_what_is_needed(x_grad, weight_grad, bias_grad, calls):
    layer = ParallelLinear(E, D, WIDTH)
    layer.weight.requires_grad_(weight_grad)
    layer.bias.requires_grad_(bias_grad)
    x, topk_ids, _ = routed_inputs(0)
    x = x.float().requires_grad_(x_grad)
    dispatch = Dispatch.of_ids(topk_ids, E)
    saved, ops = kept(lambda: layer(x, dispatch), layer.weight, layer.bias)
    assert saved == ([X] if weight_grad else [])
    assert ops.calls == calls
