"""Half precision on the CPU follows the numerical rule whether oneDNN has kernels for it or not; few tokens do, too."""

from collections.abc import Iterator

import pytest
import torch

from scatter_ops.cpu import multiply
from tests.numerics import MIN_SEEDS, Sample, assert_low_precision
from tests.ops import naive
from tests.ops.cases import GROUPED, OPS, SCATTERED, Case, Sizes, _expert, _layout, map_tensors
from tests.ops.test_numerics import sample

LARGE = (
    Case("parallel_linear", "skewed", bias=True, options=SCATTERED),
    Case("parallel_linear", "sentinels", parameters="list", transposed=True, options=_layout(False, True)),
    Case("adapted_linear", options=GROUPED),
    Case("mlp", "skewed", options=_expert("silu", "separate")),
    Case("mlp", "empty experts", parameters="view", bias=True, options=_expert("gelu", "concatenated")),
)
FEW = (
    Case("mlp", options=_expert("silu", "concatenated")),
    Case("mlp", parameters="list", transposed=True, options=_expert("relu", "plain")),
    Case("mlp", "sentinels", parameters="strided", options=_expert("silu", "separate", out_dtype=torch.float32)),
)


@pytest.fixture(params=["with kernels of oneDNN", "without"])
def _kernels_of_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    names = {} if request.param == "with kernels of oneDNN" else dict.fromkeys(multiply.HALF_PRECISION, "none")
    monkeypatch.setattr(multiply, "HALF_PRECISION", names)
    multiply.multiplies_slowly.cache_clear()
    assert multiply.multiplies_slowly(torch.bfloat16) == bool(names)
    yield
    multiply.multiplies_slowly.cache_clear()


@pytest.mark.usefixtures("_kernels_of_onednn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_rows(case: Case, dtype: torch.dtype):
    assert_low_precision([sample(case, dtype, "cpu", seed) for seed in range(MIN_SEEDS)], dtype)


@pytest.mark.usefixtures("_kernels_of_onednn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_tokens_without_gradients(case: Case, tokens: int, dtype: torch.dtype):
    sizes = Sizes(T=tokens, K=2, E=8, D=512, F=64)
    assert_low_precision([forward(case, sizes, dtype, seed) for seed in range(MIN_SEEDS)], dtype)


@torch.no_grad()
def forward(case: Case, sizes: Sizes, dtype: torch.dtype, seed: int) -> Sample:
    arguments = case.arguments(sizes, dtype, seed=seed)
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, arguments)
    op, loop = getattr(OPS, case.op), getattr(naive, case.op)
    return Sample(
        *({"output": function(*given)} for function, given in ((op, arguments), (loop, arguments), (loop, wide)))
    )
