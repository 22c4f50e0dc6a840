"""Hopper's kernels against the portable ones: as exact, and bitwise equal where they add up in the same order."""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from scatter_ops import reference, tuning
from tests.numerics import MIN_SEEDS, Sample, assert_low_precision

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from scatter_ops import cuda
from scatter_ops.cuda import glu_backward, glu_forward, grouped_gemm, parameters, weight_grad
from scatter_ops.cuda.operands import Routing, Rows
from tests.kernels.hopper import require_hopper, spied
from tests.kernels.layer import as_double, in_layout, layer, step_in_layout

pytestmark = pytest.mark.gpu


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
