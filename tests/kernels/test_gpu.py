"""What only a GPU can show: CUDA graphs, addresses beyond 2^31 elements, no compilation for a new number of tokens.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import registrations  # noqa: F401  registers the operators
from scatter_ops import reference
from tests.numerics import MIN_SEEDS, Sample, assert_exact, assert_low_precision

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from triton.runtime.jit import JITFunction

from scatter_ops import cuda, tuning
from scatter_ops.cuda import glu_backward, glu_forward, grouped_gemm, parameters, weight_grad
from scatter_ops.cuda.operands import Routing, Rows

pytestmark = pytest.mark.gpu

NEEDS = [True, True, True, False, True, False, False, False]


def require_hopper(launcher: ModuleType) -> None:
    """Other GPUs, and a Triton whose Gluon is another one, have the portable kernels alone: nothing to compare."""
    if torch.cuda.get_device_capability() != (9, 0) or launcher.hopper is None:
        pytest.skip("needs Hopper, and the Gluon that its kernels are written in")


class Layer(NamedTuple):
    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_up: list[Tensor]
    down: list[Tensor]
    grad_out: Tensor


def layer(T=640, K=2, E=8, D=256, F=192, dtype=torch.bfloat16, listed=False, seed=0) -> Layer:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=dtype, generator=generator) * scale

    def weights(num_out: int, num_in: int) -> list[Tensor]:
        stacked = normal(E, num_out, num_in, scale=num_in**-0.5)
        return [w.clone() for w in stacked] if listed else [stacked]

    scores = torch.rand(T, E, device="cuda", generator=generator)
    topk_weights, topk_ids = scores.topk(K)
    return Layer(normal(T, D), topk_weights, topk_ids, weights(2 * F, D), weights(D, F), normal(T, D))


def step(inputs: Layer, implementation=cuda) -> tuple[Tensor, ...]:
    routing = implementation.route(inputs.topk_ids, inputs_experts(inputs))
    options = ("silu", "concatenated", False, "output", 1.702, 7.0, None)
    arguments = (inputs.x, inputs.topk_weights, *routing, inputs.gate_up, [], inputs.down, [], [], [], *options)
    out, h, _ = implementation.mlp_forward(*arguments, True, False)
    grads = implementation.mlp_backward(inputs.grad_out, h, None, *arguments, NEEDS)
    return out, *(grad for grad in grads if grad.numel())


def inputs_experts(inputs: Layer) -> int:
    return inputs.down[0].shape[0] if len(inputs.down) == 1 else len(inputs.down)


def as_double(inputs: Layer) -> Layer:
    return Layer(
        *(
            [w.double() for w in v] if isinstance(v, list) else v.double() if v.is_floating_point() else v
            for v in inputs
        )
    )


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_tiles_of_every_size(tokens: int, dtype: torch.dtype, poisoned_memory):
    """Few and many rows for each expert take other tiles; the rule holds for all of them."""
    samples = []
    for seed in range(MIN_SEEDS):
        inputs = layer(T=tokens, E=4, D=512, F=320, dtype=dtype, seed=seed)
        results = (step(inputs), naive_step(inputs), naive_step(as_double(inputs)))
        samples.append(Sample(*(dict(zip(("out", "x", "s", "gate_up", "down"), r, strict=True)) for r in results)))
    if tokens * 2 * MIN_SEEDS < 4096:  # the rule wants that many elements, and there is one router weight a slot
        samples = [
            Sample(*({k: v for k, v in r.items() if k != "s"} for r in (s.candidate, s.naive, s.truth)))
            for s in samples
        ]
    assert_low_precision(samples, dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_follows_the_precision_of_products(precision: str, transposed: bool, poisoned_memory):
    """As exact as float32 is with "highest", as PyTorch's products in TF32 with "high"."""
    samples = []
    for seed in range(MIN_SEEDS):
        inputs = layer(T=1024, E=4, D=512, F=320, dtype=torch.float32, seed=seed)
        exact, options = as_double(inputs), ("concatenated", transposed)
        runs = ((inputs, cuda), (inputs, reference), (exact, reference))
        samples.append(Sample(*(step_in_layout(i, in_layout(i, *options), *options, how) for i, how in runs)))
    if precision == "high":
        assert_low_precision(samples, torch.float32)
    else:
        for sample in samples:
            assert_exact(sample.candidate, sample.truth)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1], ids=hex)
def test_float32_keeps_what_is_not_a_number(bits: int, precision: str, poisoned_memory):
    """Whatever bits it has: all that are set, say, which is what devices make."""
    inputs = layer(dtype=torch.float32)
    inputs.x.view(torch.int32)[3, 5] = bits
    routing = cuda.route(inputs.topk_ids, 8)
    y = cuda.parallel_linear(inputs.x, inputs.gate_up, *routing, 2, False, False, [])
    assert y[6:8].isnan().all()
    assert y.isfinite().sum() == y.numel() - y[6:8].numel()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("dtype", "D", "F"), [(torch.bfloat16, 512, 320), (torch.bfloat16, 520, 328), (torch.float16, 512, 320)], ids=str
)
def test_hopper_kernels_are_as_exact_as_the_portable_ones(
    dtype: torch.dtype, D: int, F: int, grouped: bool, layout: str, transposed: bool, poisoned_memory, monkeypatch
):
    """grouped: rows are copied into grouped order first, else the kernels gather them."""
    require_hopper(glu_backward)
    select = tuning.select
    monkeypatch.setattr(tuning, "select", lambda *shape: replace(select(*shape), regroup=grouped))
    samples = []
    for seed in range(MIN_SEEDS):
        inputs = layer(T=1024, E=4, D=D, F=F, dtype=dtype, seed=seed)
        weights, options = in_layout(inputs, layout, transposed), (layout, transposed)
        overlapped = step_in_layout(inputs, weights, *options, cuda)
        with contextlib.ExitStack() as stack:
            for module in (glu_backward, glu_forward, grouped_gemm, weight_grad):
                stack.enter_context(mock.patch.object(module, "hopper", None))
            portable = step_in_layout(inputs, weights, *options, cuda)
        exact = as_double(inputs)
        truth = step_in_layout(exact, in_layout(exact, layout, transposed), *options, reference)
        samples.append(Sample(overlapped, portable, truth))
    assert_low_precision(samples, dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "plain", "separate"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("save_h", "D", "F"), [(False, 520, 328), (True, 512, 320), (True, 520, 328)])
def test_hopper_kernel_gives_the_activation_that_the_portable_one_gives(
    save_h: bool, D: int, F: int, grouped: bool, layout: str, transposed: bool, poisoned_memory
):
    """The same sums in the same order, and the same rounding: bitwise, rows of sentinels included."""
    require_hopper(glu_forward)
    inputs = layer(T=3000, E=5, K=2, D=D, F=F)
    inputs.topk_ids[::7, 0] = 1000
    weights = in_layout(inputs, layout, transposed)

    def forward() -> tuple[Tensor, ...]:
        routing = cuda.route(inputs.topk_ids, 5)
        options = ("silu", layout, transposed, "output", 1.702, 7.0, None)
        return cuda.mlp_forward(inputs.x, inputs.topk_weights, *routing, *weights, [], [], [], *options, save_h, False)

    select = tuning.select
    with mock.patch.object(tuning, "select", lambda *shape: replace(select(*shape), regroup=grouped)):
        with mock.patch.object(glu_forward, "hopper", None):
            expected = forward()
        with spied(glu_forward.hopper, "launch_glu_forward") as launched:
            results = [forward() for _ in range(3)]
    assert launched == [True, True, True]
    for ours in results:
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("num_ways", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("divisor", [0, 2])
@pytest.mark.parametrize("k", [192, 200])
def test_hopper_kernel_gives_the_products_that_the_portable_one_gives(
    k: int, divisor: int, listed: bool, transposed: bool, num_ways: int, poisoned_memory
):
    """Bitwise, rows of sentinels included; one expert has no rows, one few. Two ways follow one another along k.

    x is a part of wider rows, of which the rest isn't read.
    """
    require_hopper(grouped_gemm)
    routing = uneven_routing()
    wide = torch.full((4000 if divisor else 8000, num_ways * k + 8), torch.nan, device="cuda", dtype=torch.bfloat16)
    x = wide[:, : num_ways * k].normal_()

    def experts() -> list[Tensor]:
        sizes = (k, 520) if transposed else (520, k)
        if not listed:
            return [torch.randn(5, *sizes, device="cuda", dtype=torch.bfloat16)]
        return [torch.randn(2 + e, *sizes, device="cuda", dtype=torch.bfloat16)[e] for e in range(5)]

    ways = [experts() for _ in range(num_ways)]
    weight = (parameters.expert_weight, parameters.separate_weight)[num_ways - 1](*ways, transposed)
    operands = Rows(x, divisor), weight, grouped_gemm.NO_BIAS, routing, False, True
    with mock.patch.object(grouped_gemm, "hopper", None):
        expected = grouped_gemm.grouped_gemm(*operands)
    with spied(grouped_gemm.hopper, "launch_grouped_gemm") as launched:
        results = [grouped_gemm.grouped_gemm(*operands) for _ in range(3)]
    assert launched == [num_ways == 1 or divisor == 0] * 3  # nobody multiplies gathered rows by two ways
    assert not expected.isnan().any()
    for ours in results:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("p_size", "q_size"), [(256, 256), (144, 528), (136, 520), (1024, 2048)])
@pytest.mark.parametrize(("left_divisor", "right_divisor"), [(0, 0), (2, 0), (0, 2), (1, 2)])
def test_hopper_kernel_gives_the_weight_gradients_that_the_portable_one_gives(
    left_divisor: int, right_divisor: int, p_size: int, q_size: int, poisoned_memory
):
    """Bitwise; one expert has no rows, one fewer than a step, and nobody reads the rows of sentinels.

    The largest gradient has more tiles than there are programs.
    """
    require_hopper(weight_grad)
    routing = uneven_routing()

    def rows(divisor: int, num_columns: int) -> Rows:
        data = torch.randn(8000 // max(1, divisor), num_columns, device="cuda", dtype=torch.bfloat16)
        data[routing.order_N[routing.offsets_E[-1] :].long() if divisor == 1 else slice(8000, None)] = torch.nan
        if divisor == 0:
            data[routing.offsets_E[-1] :] = torch.nan
        return Rows(data, divisor)

    operands = rows(left_divisor, p_size), rows(right_divisor, q_size), routing
    with mock.patch.object(weight_grad, "hopper", None):
        expected = weight_grad.weight_grad(*operands)
    with spied(weight_grad.hopper, "launch_weight_grad") as launched:
        results = [weight_grad.weight_grad(*operands) for _ in range(3)]
    assert launched == [True, True, True]
    assert not expected.isnan().any()
    for ours in results:
        assert torch.equal(ours, expected)


def uneven_routing() -> Routing:
    """Of 8000 slots to five experts: one has no rows, one seven, one about half of them; some slots are sentinels."""
    topk_ids = torch.randint(0, 5, (4000, 2), device="cuda")
    topk_ids[topk_ids == 2] = 1000
    topk_ids[topk_ids == 3] = 4
    topk_ids[:7, 0] = 3
    return Routing(*cuda.route(topk_ids, 5))


@contextlib.contextmanager
def spied(module: Any, name: str) -> Iterator[list[Any]]:
    """What a function returns, call by call."""
    function, returned = getattr(module, name), []
    with mock.patch.object(module, name, lambda *args: returned.append(function(*args)) or returned[-1]):
        yield returned


def in_layout(inputs: Layer, layout: str, transposed: bool) -> list[list[Tensor]]:
    """Stacks of gate_up, up and down."""

    def oriented(weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous() if transposed else weight

    (gate_up,), (down,) = inputs.gate_up, inputs.down
    halves = gate_up.chunk(2, dim=1)
    gate, up = oriented(torch.stack(halves))
    first = {"plain": gate, "separate": gate, "interleaved": oriented(torch.stack(halves, 2).flatten(1, 2))}
    return [[first.get(layout, oriented(gate_up))], [up] if layout == "separate" else [], [oriented(down)]]


def step_in_layout(
    inputs: Layer, weights: list[list[Tensor]], layout: str, transposed: bool, implementation
) -> dict[str, Tensor]:
    """Output and gradients with gate_up, up and down in that layout."""
    routing = implementation.route(inputs.topk_ids, inputs_experts(inputs))
    options = ("silu", layout, transposed, "output", 1.702, 7.0, None)
    arguments = (inputs.x, inputs.topk_weights, *routing, *weights, [], [], [], *options)
    out, h, _ = implementation.mlp_forward(*arguments, True, False)
    needs = [True, True, True, layout == "separate", True, False, False, False]
    names = ("x", "s", "gate_up", "up", "down")
    found = implementation.mlp_backward(inputs.grad_out, h, None, *arguments, needs)
    return {"out": out} | {name: grad for name, grad, need in zip(names, found, needs, strict=False) if need}


def naive_step(inputs: Layer) -> tuple[Tensor, ...]:
    """A loop over experts as models write it, differentiated by autograd."""
    x, topk_weights, gate_up, down = (
        t.detach().requires_grad_() for t in (inputs.x, inputs.topk_weights, inputs.gate_up[0], inputs.down[0])
    )
    out = torch.zeros_like(x)
    for e in range(down.shape[0]):
        token, k = torch.where(inputs.topk_ids == e)
        gate, up = (x[token] @ gate_up[e].t()).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].t()
        out = out.index_add(0, token, (y * topk_weights[token, k, None]).to(x.dtype))
    out.backward(inputs.grad_out)
    return out.detach(), x.grad, topk_weights.grad, gate_up.grad, down.grad


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
