"""The sum of x's gradient on a stream of its own, beside the weight gradients: the same bits, and safe memory."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from scatter_ops import cuda
from scatter_ops.cuda import gate_up_backward, weight_grad
from scatter_ops.cuda.streams import aside
from tests.kernels.hopper import require_hopper, spied
from tests.kernels.layer import Layer, in_layout, inputs_experts, layer, step, step_in_layout

pytestmark = pytest.mark.gpu


@pytest.fixture
def short_sums_aside() -> Iterator[list[int]]:
    """Multiprocessors that each step left to its sum."""
    require_hopper(weight_grad)
    with (
        mock.patch.object(gate_up_backward, "LEAST_BYTES_ASIDE", 0),
        spied(gate_up_backward, "_num_spared") as spared,
    ):
        yield spared


def step_in_turn(inputs: Layer) -> tuple[Tensor, ...]:
    with mock.patch.object(gate_up_backward, "_num_spared", lambda *_: 0):
        return step(inputs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
def test_the_sum_aside_gives_the_same_bits(layout: str, transposed: bool, short_sums_aside, poisoned_memory):
    inputs = layer(T=3000)
    inputs.topk_ids[::7, 0] = 1000
    weights = in_layout(inputs, layout, transposed)
    aside = step_in_layout(inputs, weights, layout, transposed, cuda)
    with mock.patch.object(gate_up_backward, "_num_spared", lambda *_: 0):
        in_turn = step_in_layout(inputs, weights, layout, transposed, cuda)
    assert short_sums_aside == [8]
    for name, result in aside.items():
        assert torch.equal(result, in_turn[name]), name


def test_memory_is_reused_only_when_the_sum_is_done(short_sums_aside):
    """Steps that follow one another on a stream that isn't the default one, and never wait for the device."""
    all_inputs = [layer(T=16384, seed=seed) for seed in range(3)]
    expected = [step_in_turn(inputs) for inputs in all_inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # the host runs ahead of it
        results = [step(inputs) for _ in range(4) for inputs in all_inputs]
    torch.cuda.synchronize()
    assert short_sums_aside == [8] * len(results)
    for number, result in enumerate(results):
        for a, b in zip(result, expected[number % 3], strict=True):
            assert torch.equal(a, b)


def test_a_graph_captures_the_sum_aside(short_sums_aside):
    static, fresh = layer(T=3000), layer(T=3000, seed=1)
    step(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    for into, value in zip(static[:3], fresh[:3], strict=True):
        into.copy_(value)
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert short_sums_aside == [8, 8]
    for replayed, eager in zip(results, step_in_turn(static), strict=True):
        assert torch.equal(replayed, eager)


def test_a_step_holds_no_more_memory_at_its_peak(short_sums_aside):
    inputs = layer(T=16384, D=512, F=512)
    order, offsets = torch.ops.scatter_moe.route(inputs.topk_ids, inputs_experts(inputs))
    weights = (inputs.gate_up, [], inputs.down, [], [], [])
    differentiated = (inputs.x, inputs.topk_weights, *inputs.gate_up, *inputs.down)
    for tensor in differentiated:
        tensor.requires_grad_()

    def peak() -> int:
        out = torch.ops.scatter_moe.mlp(inputs.x, inputs.topk_weights, order, offsets, *weights, "silu", "concatenated")
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(out, differentiated, inputs.grad_out)
        return torch.cuda.max_memory_allocated()

    together = peak()
    assert short_sums_aside == [8]
    with mock.patch.object(gate_up_backward, "_num_spared", lambda *_: 0):
        assert together <= peak()


def test_the_current_stream_waits_also_after_an_error():
    values, start = torch.zeros(2**20, device="cuda"), torch.cuda.Event()
    start.record()

    def fail() -> None:
        with aside(start):
            torch.cuda._sleep(10**8)
            values.fill_(1)
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert values.clone().min() == 1
