"""The numerical rule for the kernels on a GPU: tiles of every size, float32 in both precisions of products."""

import pytest
import torch

from scatter_ops import reference
from tests.numerics import MIN_SEEDS, Sample, assert_exact, assert_low_precision

pytest.importorskip("triton", reason="kernels need triton", exc_type=ImportError)

from scatter_ops import cuda
from tests.kernels.layer import as_double, in_layout, layer, naive_step, step, step_in_layout

pytestmark = pytest.mark.gpu


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
