"""What only a GPU can show: CUDA graphs, addresses beyond 2^31 elements, no compilation for a new number of tokens.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width.
"""

from unittest import mock

import pytest
import torch

import registrations  # noqa: F401  registers the operators
from scatter_ops import reference

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from triton.runtime.jit import JITFunction

from scatter_ops import cuda
from scatter_ops.cuda import parameters
from tests.kernels.layer import in_layout, inputs_experts, layer, step, step_in_layout

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("listed", [False, True])
def test_cuda_graph_follows_new_routing(listed: bool):
    """Forward and backward are captured once and replayed on other tokens, weights and routing, sentinels included."""
    static, fresh = layer(listed=listed), layer(listed=listed, seed=1)
    fresh.topk_ids[::7] = 1000
    step(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static)
    for into, value in zip(static, fresh, strict=True):
        for a, b in zip(into, value, strict=True) if isinstance(into, list) else [(into, value)]:
            a.copy_(b)
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    for replayed, eager in zip(results, step(fresh), strict=True):
        assert torch.equal(replayed, eager)


def test_weights_first_met_in_a_capture_are_refused():
    parameters._arrays.clear()  # an earlier test's weights may have been at the same addresses
    known, new = layer(listed=True), layer(listed=True, seed=1)
    step(known)
    with pytest.raises(RuntimeError, match="run the model once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(new)


def test_h_is_overwritten_where_it_is_read_last():
    """Backward twice with the graph retained is right, and without it needs h's memory less."""
    inputs = layer(T=16384, D=256, F=1024)
    differentiated = (inputs.x, inputs.topk_weights, *inputs.gate_up, *inputs.down)
    for tensor in differentiated:
        tensor.requires_grad_()
    order, offsets = torch.ops.scatter_moe.route(inputs.topk_ids, inputs_experts(inputs))
    weights = (inputs.gate_up, [], inputs.down, [], [], [])
    out = torch.ops.scatter_moe.mlp(inputs.x, inputs.topk_weights, order, offsets, *weights, "silu", "concatenated")
    peaks, results = [], []
    for retain_graph in (True, True, False):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results.append(torch.autograd.grad(out, differentiated, inputs.grad_out, retain_graph=retain_graph))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    for again in results[1:]:
        for a, b in zip(results[0], again, strict=True):
            assert torch.equal(a, b)
    if torch.cuda.get_device_capability() >= (9, 0):
        h_bytes = order.numel() * 2 * 1024 * 2
        assert peaks[1] - peaks[2] >= 0.9 * h_bytes


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
def test_lists_give_what_stacks_give(layout: str, transposed: bool):
    """The same tiles in the same order, wherever the experts' weights lie: bitwise."""
    inputs = layer(T=3000)
    stacks = in_layout(inputs, layout, transposed)
    lists = [
        [w.new_empty(2 + e % 3, *w.shape)[1].copy_(w) for stack in group for e, w in enumerate(stack)]
        for group in stacks
    ]
    expected = step_in_layout(inputs, stacks, layout, transposed, cuda)
    for name, result in step_in_layout(inputs, lists, layout, transposed, cuda).items():
        assert torch.equal(result, expected[name]), name


def test_results_repeat_bitwise():
    inputs = layer(T=3000)
    for first, second in zip(step(inputs), step(inputs), strict=True):
        assert torch.equal(first, second)


def test_a_new_number_of_tokens_compiles_nothing():
    step(layer(T=2048))
    with mock.patch.object(JITFunction, "_do_compile", side_effect=AssertionError("compiled")):
        for num_tokens in (2047, 1999, 1025):
            step(layer(T=num_tokens))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Rows, weights and outputs whose offsets overflow 32 bits: the last slot and the last expert are right."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    T, K, E, D, F = 1_100_000, 2, 300, 1024, 7200
    x = torch.randn(T, 32, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, E, (T, K), device="cuda")
    weight = torch.randn(E, D, 32, device="cuda", dtype=torch.bfloat16)
    routing = cuda.route(ids, E)
    y = cuda.parallel_linear(x, [weight], *routing, K, False, False, [])
    assert y.numel() > 2**31
    for slot in (0, T * K // 2, T * K - 1):
        expected = weight[ids.view(-1)[slot]].float() @ x[slot // K].float()
        torch.testing.assert_close(y[slot].float(), expected, rtol=2e-2, atol=2e-2)
    combined = cuda.combine(y, None, *routing, K, False)
    torch.testing.assert_close(combined[-1].float(), y[-K:].float().sum(0), rtol=2e-2, atol=2e-2)
    del y, combined

    wide = torch.randn(E, F, D, device="cuda", dtype=torch.bfloat16)
    assert wide.numel() > 2**31
    rows = torch.randn(1, D, device="cuda", dtype=torch.bfloat16)
    last = cuda.route(torch.full((1, 1), E - 1, device="cuda"), E)
    y = cuda.parallel_linear(rows, [wide], *last, 1, False, True, [])
    torch.testing.assert_close(y[0].float(), wide[-1].float() @ rows[0].float(), rtol=2e-2, atol=0.2)
    grad = cuda.parallel_linear_weight_grad(rows, y, *last, 1, False, True)
    assert grad.numel() > 2**31
    assert grad[: E - 1].count_nonzero() == 0
    expected = reference.parallel_linear_weight_grad(
        rows, y, torch.zeros_like(last[0]), torch.ones_like(last[1][:1]), 1, False, True
    )
    assert torch.equal(grad[-1], expected[0])
