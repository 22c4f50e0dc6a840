"""The kernels, interpreted on the CPU, against the specification: float32 and float16, awkward sizes.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width.
"""

from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from scatter_ops import reference, tuning
from scatter_ops.tuning import Config
from tests.numerics import assert_exact

T, K, E, D, F = 11, 2, 5, 24, 40
CONFIGS = {
    "portable": Config(16, 32, 16, group_m=2, num_warps=4, num_stages=1),
    "descriptors": Config(
        16, 32, 16, group_m=2, num_warps=4, num_stages=1, programs_per_sm=1, tma=True, regroup=True, epilogue_parts=2
    ),
}
# layout, activation, weight_on, transposed, bias, list
EXPERTS = [
    ("concatenated", "silu", "output", False, False, False),
    ("concatenated", "gelu", "input", True, True, True),
    ("separate", "silu", "output", False, True, True),
    ("separate", "relu", "input", True, False, False),
    ("interleaved", "clamped_swiglu", "output", True, True, False),
    ("interleaved", "gelu_tanh", "input", False, True, True),
    ("plain", "relu2", "output", False, True, False),
]


@pytest.fixture(params=CONFIGS)
def cuda(request, interpreted: ModuleType):
    config = CONFIGS[request.param]
    with mock.patch.object(tuning, "select", lambda *args: config):
        yield interpreted


@pytest.fixture
def routing() -> tuple[Tensor, Tensor]:
    """Sentinels among the slots, and no token for the last expert."""
    ids = torch.randint(-1, E - 1, (T, K), generator=torch.Generator().manual_seed(0))
    return reference.route(ids, E)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size)))


def assert_close(ours, expected, dtype: torch.dtype) -> None:
    """float32 by the rule; a float16 result may round the other way, and so may operands of the product before."""
    ours, expected = dict(enumerate(ours)), dict(enumerate(expected))
    if dtype == torch.float32:
        assert_exact(ours, expected)
        return
    for i, tensor in expected.items():
        error = (ours[i].double() - tensor.double()).norm()
        assert error <= 2 * torch.finfo(dtype).eps * tensor.double().norm(), f"result {i}"


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(0, 2, 4), (1, 1, 1), (5, 2, 3), (700, 4, 37), (200, 8, 512)]
)
def test_route(interpreted, num_tokens: int, top_k: int, num_experts: int):
    ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k))
    for ours, expected in zip(interpreted.route(ids, num_experts), reference.route(ids, num_experts), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("grouped_in", [False, True])
@pytest.mark.parametrize("grouped_out", [False, True])
@pytest.mark.parametrize(("transposed", "listed"), [(False, False), (True, True)])
def test_parallel_linear(cuda, routing, grouped_in: bool, grouped_out: bool, transposed: bool, listed: bool):
    x, grad = normal(T * K if grouped_in else T, D), normal(T * K, F)
    weight, bias = normal(E, D, F) if transposed else normal(E, F, D), normal(E, F)
    weights, biases = ([w.clone() for w in weight], list(bias.clone())) if listed else ([weight], [bias])
    layout = (*routing, K, grouped_in, grouped_out)

    def results(implementation):
        return (
            implementation.parallel_linear(x, weights, *layout, biases, transposed),
            implementation.parallel_linear_weight_grad(x, grad, *layout, transposed),
            implementation.parallel_linear_bias_grad(grad, *routing, grouped_out),
        )

    assert_close(results(cuda), results(reference), torch.float32)


@pytest.mark.parametrize("grouped_in", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows(interpreted, routing, grouped_in: bool, weighted: bool):
    x, y, grad = normal(T, D), normal(T * K, D), normal(T, D, seed=1)
    weights = normal(T, K) if weighted else None
    parameter = normal(E, 3, 5)

    def results(implementation):
        layout = (*routing, K, grouped_in)
        return (
            implementation.dispatch(x, *routing, K),
            implementation.combine(y, weights, *layout),
            *implementation.combine_backward(grad, y, weights, *layout, True, weighted),
            implementation.expand([parameter], routing[1], T * K),
            implementation.expand(list(parameter.clone()), routing[1], T * K),
            implementation.expand_backward(y.view(T * K, 4, 6), routing[1]),
        )

    assert_close(results(interpreted), results(reference), torch.float32)


def expert_arguments(layout, activation, weight_on, transposed, bias, listed, dtype, routing, num_tokens=T):
    gated_width = 2 * F if layout in ("concatenated", "interleaved") else F
    widths = [(gated_width, D), (F, D), (D, F)]
    weights = [[normal(E, *w, seed=i).to(dtype) / w[1] ** 0.5] for i, w in enumerate(widths)]
    biases = [[normal(E, w[0], seed=i).to(dtype)] if bias else [] for i, w in enumerate(widths)]
    if layout != "separate":
        weights[1], biases[1] = [], []
    if transposed:
        weights = [[w.transpose(1, 2).contiguous() for w in group] for group in weights]
    if listed:
        weights, biases = ([[w.clone() for e in group for w in e] for group in groups] for groups in (weights, biases))
    x, scores = normal(num_tokens, D).to(dtype), normal(num_tokens, K).sigmoid()
    options = (activation, layout, transposed, weight_on, 1.702, 0.7, None)
    return x, scores, *routing, *weights, *biases, *options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("expert", EXPERTS, ids=lambda expert: "-".join(map(str, expert)))
def test_mlp(cuda, routing, expert, dtype: torch.dtype):
    arguments = expert_arguments(*expert, dtype, routing)
    out, h, y = reference.mlp_forward(*arguments, True, True)
    ours = cuda.mlp_forward(*arguments, True, True)
    assert_close(ours, (out, h, y), dtype)
    without_h, *empty = cuda.mlp_forward(*arguments, False, False)
    assert torch.equal(without_h, ours[0])
    assert [tensor.shape for tensor in empty] == [(0,), (0,)]

    has_up, has_bias = bool(arguments[5]), bool(arguments[7])
    needs = [True, True, True, has_up, True, has_bias, has_bias and has_up, has_bias]
    grad_out = normal(T, D, seed=2).to(dtype)
    expected = reference.mlp_backward(grad_out, h, None, *arguments, needs)
    assert_close(cuda.mlp_backward(grad_out, h, None, *arguments, needs), expected, dtype)


@pytest.mark.parametrize("absent", [7, 8, 9], ids=["gate_up_bias", "up_bias", "down_bias"])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_a_bias_may_be_absent(interpreted, routing, weight_on: str, absent: int):
    """Of gate, up and down, each its own; and what is in one stack beside what is a list of pointers."""
    arguments = list(expert_arguments("separate", "silu", weight_on, False, True, False, torch.float32, routing))
    arguments[8] = [bias.clone() for bias in reversed(arguments[8][0].flip(0))]
    arguments[absent] = []
    out, h, y = reference.mlp_forward(*arguments, True, True)
    needs = [True] * 5 + [bool(arguments[i]) for i in (7, 8, 9)]
    config = Config(16, 32, 16, num_warps=4, num_stages=1)
    with mock.patch.object(tuning, "select", lambda *args: config):
        assert_close(interpreted.mlp_forward(*arguments, True, True), (out, h, y), torch.float32)
        ours = interpreted.mlp_backward(normal(T, D), h, None, *arguments, needs)
    assert_close(ours, reference.mlp_backward(normal(T, D), h, None, *arguments, needs), torch.float32)
    assert len({grad.data_ptr() for grad in ours if grad.numel()}) == sum(needs)


@pytest.mark.parametrize("needed", range(8))
def test_one_gradient_alone(interpreted, routing, needed: int):
    """Each gradient is right when no other is wanted."""
    arguments = expert_arguments("separate", "silu", "output", False, True, False, torch.float32, routing)
    _, h, _ = reference.mlp_forward(*arguments, True, False)
    needs = [i == needed for i in range(8)]
    config = Config(16, 32, 16, num_warps=4, num_stages=1)
    with mock.patch.object(tuning, "select", lambda *args: config):
        ours = interpreted.mlp_backward(normal(T, D), h, None, *arguments, needs)
    expected = reference.mlp_backward(normal(T, D), h, None, *arguments, needs)
    assert_close(ours, expected, torch.float32)
    assert [grad.numel() > 0 for grad in ours] == needs


@pytest.mark.parametrize("expert", EXPERTS[:2], ids=lambda expert: "-".join(map(str, expert)))
def test_h_may_be_overwritten(cuda, routing, expert):
    arguments = expert_arguments(*expert, torch.float32, routing)
    _, h, _ = reference.mlp_forward(*arguments, True, False)
    has_up, has_bias = bool(arguments[5]), bool(arguments[7])
    needs = [True, True, True, has_up, True, has_bias, has_bias and has_up, has_bias]
    scratch, grad_out = h.clone(), normal(T, D, seed=2)
    ours = cuda.mlp_backward(grad_out, scratch, None, *arguments, needs, overwrite_h=True)
    assert_close(ours, reference.mlp_backward(grad_out, h, None, *arguments, needs), torch.float32)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(cuda, num_tokens: int):
    routing = reference.route(torch.full((num_tokens, K), 2), E)
    arguments = expert_arguments(*EXPERTS[0], torch.float32, routing, num_tokens)
    out, h, y = reference.mlp_forward(*arguments, True, True)
    assert_close(cuda.mlp_forward(*arguments, True, True), (out, h, y), torch.float32)
    needs = [True, True, True, False, True, False, False, False]
    grad_out = normal(num_tokens, D)
    expected = reference.mlp_backward(grad_out, h, None, *arguments, needs)
    assert_close(cuda.mlp_backward(grad_out, h, None, *arguments, needs), expected, torch.float32)


def test_any_strides(cuda, routing):
    """Weights dense in no dimension, or shared by all experts; rows that are columns of something wider."""
    x = normal(T, 2 * D)[:, ::2]
    for weight in (
        normal(E, 2 * F, 2 * D)[:, ::2, ::2],
        normal(1, F, D).expand(E, F, D),
        normal(F, E, D).transpose(0, 1),
    ):
        layout = (*routing, K, False, False, [])
        ours, expected = (m.parallel_linear(x, [weight], *layout) for m in (cuda, reference))
        assert_close([ours], [expected], torch.float32)
