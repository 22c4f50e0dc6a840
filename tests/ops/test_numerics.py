"""Low precision: outputs and all gradients follow the numerical rule against the naive loop in the same dtype."""

import pytest
import torch

from tests.numerics import MIN_SEEDS, Sample, assert_low_precision
from tests.ops import naive
from tests.ops.cases import GROUPED, OPS, SCATTERED, Case, Sizes, _expert, _layout, map_tensors
from tests.ops.test_table import results

SIZES = Sizes(T=256, K=2, E=8, D=64, F=64)
CASES = (
    Case("dispatch", "sentinels"),
    Case("parallel_linear", "skewed", bias=True, options=SCATTERED),
    Case("parallel_linear", "sentinels", parameters="list", transposed=True, options=_layout(False, True)),
    Case("parallel_linear", "empty experts", parameters="view", bias=True, options=GROUPED),
    Case("adapted_linear", options=SCATTERED),
    Case("adapted_linear", "skewed", transposed=True, options=_layout(False, True)),
    Case("combine", options={"grouped_in": True}),
    Case("combine", "duplicates", options={"grouped_in": False, "topk_dtype": torch.float32}),
    Case("expand", "skewed"),
    Case("mlp", bias=True, options=_expert("silu", "concatenated")),
    Case("mlp", "sentinels", parameters="list", options=_expert("gelu_tanh", "separate")),
    Case("mlp", "skewed", bias=True, transposed=True, options=_expert("clamped_swiglu", "interleaved")),
    Case("mlp", bias=True, options=_expert("relu2", "plain", topk_dtype=torch.float32)),
    Case("mlp", bias=True, options=_expert("silu", "concatenated", weight_on="input")),
    Case("mlp", options=_expert("gelu", "concatenated", out_dtype=torch.float32)),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_precision(case: Case, dtype: torch.dtype, device: str):
    samples = [sample(case, dtype, device, seed) for seed in range(MIN_SEEDS)]
    assert_low_precision(samples, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_thin_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    for decision in ("_sums_take_less", "_whole_grads_take_less"):
        monkeypatch.setattr(f"scatter_ops.cpu.adapted_linear.{decision}", lambda *sizes: False)
    case = Case("adapted_linear", options=GROUPED)
    assert_low_precision([sample(case, dtype, "cpu", seed) for seed in range(MIN_SEEDS)], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_gradients_on_the_cpu(dtype: torch.dtype):
    """Where the output is float32, its gradient is multiplied by router weights of float32 before it is rounded."""
    options = _expert("silu", "separate", topk_dtype=torch.float32, out_dtype=torch.float32)
    case = Case("mlp", bias=True, options=options)
    samples = [sample(case, dtype, "cpu", seed, upstream=torch.float32) for seed in range(MIN_SEEDS)]
    assert_low_precision(samples, dtype)


def sample(case: Case, dtype: torch.dtype, device: str, seed: int, upstream: torch.dtype = torch.bfloat16) -> Sample:
    arguments = case.arguments(SIZES, dtype, device, seed)
    wide = map_tensors(lambda t: t.detach().double().requires_grad_() if t.is_floating_point() else t, arguments)
    op, loop = getattr(OPS, case.op), getattr(naive, case.op)
    return Sample(*(results(f, given, upstream) for f, given in ((op, arguments), (loop, arguments), (loop, wide))))
