"""Calls like an earlier one launch the same kernels on their own tensors: without a GPU what is launched, with one the
results.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from triton.runtime.jit import JITFunction

import registrations  # noqa: F401  registers the operators
from scatter_ops import cuda, reference
from scatter_ops.cuda import operands, plans

OPS = torch.ops.scatter_moe
E, D, F, K = 16, 256, 128, 2


class Compiled:
    """In place of a compiled kernel: notes how it is launched."""

    run = None  # no launcher that could be prepared

    def __init__(self, kernel: JITFunction, launches: list[Any]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream=None: self.launches.append((self.kernel.__name__, grid, args))


@pytest.fixture
def launches() -> Iterator[list[Any]]:
    """Of kernels for an H100, noted instead of made."""
    noted = []

    def run(kernel, *args, grid, warmup, **kwargs):
        compiled = Compiled(kernel, noted)
        compiled[(*grid, 1, 1)[:3]](*args, *(kwargs[name] for name in kernel.arg_names[len(args) :]))
        return compiled

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(operands, "capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: -1),  # as the CPU says of itself
        mock.patch.object(plans, "driver"),
    ):
        yield noted


def arguments(num_tokens: int, device: str, layout: str = "concatenated", on: str = "output", listed: bool = False):
    """Of mlp_forward, fresh ones with each call."""

    def weight(num_out: int, num_in: int) -> list[Tensor]:
        stacked = torch.randn(E, num_out, num_in, device=device, dtype=torch.bfloat16) * num_in**-0.5
        return [w.clone() for w in stacked] if listed else [stacked]

    x = torch.randn(num_tokens, D, device=device, dtype=torch.bfloat16)
    topk_weights, topk_ids = torch.rand(num_tokens, E, device=device).topk(K)
    topk_ids[0, 0] = E  # a sentinel
    routing = reference.route(topk_ids, E)
    up = weight(F, D) if layout == "separate" else []
    gate_up = weight(F if layout in ("plain", "separate") else 2 * F, D)
    options = ("silu", layout, False, on, 1.702, 7.0, None)
    return x, topk_weights, *routing, gate_up, up, weight(D, F), [], [], [], *options


def described(launches: list[Any], args: tuple[Any, ...], results: tuple[Tensor, ...]) -> list[Any]:
    """Launches with addresses of the call's tensors replaced by numbers, and those of workspaces by a word."""
    tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
    known = [tensor for tensor in (*tensors, *results) if isinstance(tensor, Tensor)]
    numbers = {tensor.data_ptr(): i for i, tensor in enumerate(known)}

    def describe(value: Any) -> Any:
        if hasattr(value, "block_shape"):
            return describe(value.base), list(value.shape), list(value.strides), list(value.block_shape)
        if isinstance(value, (Tensor, plans.Address)):
            value = value.data_ptr()
        elif type(value) is not int or value < 2**40:
            return value
        return f"tensor {numbers[value]}" if value in numbers else "workspace"

    return [(name, grid, [describe(arg) for arg in args]) for name, grid, args in launches]


@pytest.mark.parametrize("num_tokens", [5, 2048])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_a_call_like_an_earlier_one(layout: str, num_tokens: int, launches: list[Any]):
    original, made = mock.Mock(wraps=cuda.mlp_forward), []
    function = plans.Planned(original)
    for _ in range(4):
        args = (*arguments(num_tokens, "cpu", layout), True, False)
        del launches[:]
        results = function(*args)
        made.append(described(launches, args, results))
        assert [(result.shape, result.dtype) for result in results] == [
            ((num_tokens, D), torch.bfloat16),
            ((num_tokens * K, 2 * F), torch.bfloat16),
            ((0,), torch.bfloat16),
        ]
    assert len(made[0]) == 4
    assert made[1] == made[2] == made[3] == made[0]
    assert original.call_count == 2


@pytest.mark.parametrize("changed", [{"num_tokens": 6}, {"layout": "interleaved"}, {"on": "input"}])
def test_another_signature_is_another_plan(changed: dict[str, Any], launches: list[Any]):
    original = mock.Mock(wraps=cuda.mlp_forward)
    function = plans.Planned(original)
    for _ in range(3):
        function(*arguments(5, "cpu"), False, False)
    assert original.call_count == 2
    function(*arguments(**{"num_tokens": 5, "device": "cpu", **changed}), False, False)
    assert original.call_count == 3


def transposed_input(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].t().contiguous().t(), *args[1:]


def twice_the_same(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Square weights."""
    return args[0][:, :F].contiguous(), *args[1:4], [args[6][0][:, :F]], [], [args[6][0][:, :F]], *args[7:]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"layout": "plain"}, transposed_input),
        ({"layout": "plain"}, twice_the_same),
        ({"layout": "separate"}, lambda args: args),
        ({"listed": True}, lambda args: args),
    ],
    ids=["copied", "one_tensor", "separate", "listed"],
)
def test_what_has_no_plan(options: dict[str, Any], change: Callable[..., Any], launches: list[Any]):
    """An argument that is copied, two that are one tensor, weights that kernels find by their distances."""
    original = mock.Mock(wraps=cuda.mlp_forward)
    function = plans.Planned(original)
    for _ in range(4):
        function(*change(arguments(8, "cpu", **options)), False, False)
    assert original.call_count == 4


def test_large_workspaces_have_no_plan(launches: list[Any]):
    original = mock.Mock(wraps=cuda.mlp_forward)
    function = plans.Planned(original)
    with mock.patch.object(plans, "MAX_WORKSPACE_BYTES", 4096):
        for _ in range(4):
            function(*arguments(8, "cpu"), False, False)
    assert original.call_count == 4


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 4096])
@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
def test_results(layout: str, on: str, num_tokens: int, poisoned_memory):
    """As without plans, bit by bit; a call from within the package is made again without the dispatcher."""
    with mock.patch.object(plans.Plan, "run", autospec=True, side_effect=plans.Plan.run) as run:
        for _ in range(4):
            args = (*arguments(num_tokens, "cuda", layout, on), True, False)
            for ours, expected in zip(OPS.mlp_forward(*args), cuda.mlp_forward(*args), strict=True):
                assert torch.equal(ours, expected)
            assert torch.equal(OPS.mlp(*args[:-2]), cuda.mlp_forward(*args[:-2], False, False)[0])
    assert run.call_count >= (0 if layout == "separate" else 4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 5000])
def test_routes(num_tokens: int, poisoned_memory):
    for _ in range(4):
        topk_ids = torch.rand(num_tokens, E, device="cuda").topk(K).indices
        for ours, expected in zip(OPS.route(topk_ids, E), reference.route(topk_ids, E), strict=True):
            assert torch.equal(ours, expected)
