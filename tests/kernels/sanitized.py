"""One run of every kernel for NVIDIA's compute-sanitizer:

    python -m tests.kernels.sanitized --compile
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.kernels.sanitized

And with racecheck, of version 2026.1 or later: older ones report Triton's barriers between warps that have parts of
their own (`pip install nvidia-cuda-sanitizer-api` has it). With initcheck twice: with `--portable`, then with
`--poisoned`. initcheck doesn't see what TMA stores write, and reports every read of it. The portable kernels do without
TMA, so all of their memory is checked.
`--poisoned` is for Hopper's: memory of 16-bit elements, which is all that TMA stores to, is filled with NaN when it is
allocated. initcheck takes it for written then, and an element that is read but was never stored shows in the results.

The first command, with the same option, fills Triton's cache for a Hopper GPU, on all cores: within the sanitizer
compilation takes many minutes. Small sizes with tails in every dimension, many and few rows for each expert, sentinels,
every layout, TF32, the sum of x's gradient on a stream of its own. Exits with an error if a result has a NaN.
"""

import argparse
import contextlib
import itertools
import sys
from dataclasses import replace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import offline
from scatter_ops import cuda, tuning
from scatter_ops.cuda import gate_up_backward
from scatter_ops.cuda.recording import ALLOCATIONS

E, K = 4, 2
LAYOUTS = ("concatenated", "interleaved", "plain", "separate")
HALF = list(itertools.product((torch.bfloat16,), (9, 700), ((256, 320), (264, 328)), LAYOUTS, (False, True)))
"""Dtype, tokens, D and F, layout, whether the weights are transposed. The second sizes end within a copy's tile."""
CASES = [*HALF, (torch.float32, 700, (264, 328), "concatenated", False)]


def step(
    dtype: torch.dtype, num_tokens: int, sizes: tuple[int, int], layout: str, transposed: bool, device: str = "cuda"
) -> list[torch.Tensor]:
    d_model, d_ff = sizes

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype) * size[-1] ** -0.5

    def weight(num_out: int, num_in: int) -> torch.Tensor:
        return normal(E, num_in, num_out) if transposed else normal(E, num_out, num_in)

    x, topk_weights = normal(num_tokens, d_model), torch.rand(num_tokens, K, device=device)
    topk_ids = torch.rand(num_tokens, E, device=device).topk(K).indices
    topk_ids[::5, 0] = E
    routing = cuda.route(topk_ids, E)
    separate = layout == "separate"
    h_size = d_ff if separate or layout == "plain" else 2 * d_ff
    gate_up, up = [weight(h_size, d_model)], [weight(d_ff, d_model)] if separate else []
    biased = layout == "interleaved"  # the portable kernels do what Hopper's can't
    biases = [[normal(E, size)] if biased else [] for size in (h_size, d_ff, d_model)]
    biases[1] = []
    arguments = (x, topk_weights, *routing, gate_up, up, [weight(d_model, d_ff)], *biases, "silu", layout, transposed)
    options = ("output", 1.702, 7.0, None)
    out, h, _ = cuda.mlp_forward(*arguments, *options, True, False)
    needs = [True, True, True, separate, True, biased, False, biased]
    grads = cuda.mlp_backward(normal(num_tokens, d_model), h, None, *arguments, *options, needs, overwrite_h=True)
    y = cuda.parallel_linear(x, gate_up, *routing, K, False, False, [], transposed)
    scattered = cuda.parallel_linear_weight_grad(x, y, *routing, K, False, False, transposed)
    grouped = cuda.parallel_linear_weight_grad(x.repeat_interleave(K, 0), y, *routing, 1, True, True, transposed)
    return [out, *grads, cuda.combine(y, topk_weights, *routing, K, False), scattered, grouped]


class Poisoned(TorchDispatchMode):
    """New memory of 16-bit elements is NaN."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS and result.dtype.itemsize == 2:
            result.fill_(torch.nan)
        return result


def without_tma() -> contextlib.AbstractContextManager[object]:
    select = tuning.select
    portable = {"tma": False, "tma_out": False, "flatten": False, "overlap": False}
    return mock.patch.object(tuning, "select", lambda *shape: replace(select(*shape), **portable))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile, and run nothing")
    parser.add_argument("--portable", action="store_true", help="kernels without TMA")
    parser.add_argument("--poisoned", action="store_true", help="NaN in new memory that TMA may store to")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    gate_up_backward.LEAST_BYTES_ASIDE = 0
    with without_tma() if arguments.portable else contextlib.nullcontext():
        if arguments.compile:
            with offline.recorded((9, 0)) as launches:
                for case in CASES:
                    step(*case, device="cpu")
            offline.compile_in_parallel(launches)
            return
        with Poisoned() if arguments.poisoned else contextlib.nullcontext():
            wrong = [case for case in CASES if any(result.isnan().any() for result in step(*case))]
    torch.cuda.synchronize()
    sys.exit(f"NaN in {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
