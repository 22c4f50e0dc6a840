"""One expert MLP against dense products of the same FLOPs: python -m benchmarks.training_step C D.

The dense baseline is one [N, D] x [D, 3 F] product, and for the step its two gradients too. Ours goes from (x,
topk_weights, topk_ids) to y, sort included, and back to the gradients of x, topk_weights and both weights. Dense and
ours alternate; a ratio is dense time over ours within a round, the median over rounds is reported. A shape's results
are checked against the reference first: nothing is printed for a shape that fails.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.shapes import SHAPES, Inputs, Shape, inputs
from benchmarks.timing import peak_gib, queued_ms
from scatter_ops import cuda, reference

TOLERANCE = 1e-2  # relative RMS difference to the reference on the same bfloat16 inputs
NEEDS = [True, True, True, False, True, False, False, False]


def forward(layer: Inputs, save_h: bool, implementation: Any = cuda) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    routing = implementation.route(layer.topk_ids, layer.down.shape[0])
    options = ("silu", "concatenated", False, "output", 0.0, 0.0, None)
    arguments = (layer.x, layer.topk_weights, *routing, [layer.gate_up], [], [layer.down], [], [], [], *options)
    return *implementation.mlp_forward(*arguments, save_h), arguments


def step(layer: Inputs, implementation: Any = cuda) -> tuple[torch.Tensor, ...]:
    out, h, arguments = forward(layer, True, implementation)
    return out, *implementation.mlp_backward(layer.grad_out, h, *arguments, NEEDS)


def dense(shape: Shape, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The products of the forward and of the whole step."""
    rows, columns = shape.T * shape.K, 3 * shape.F
    x = torch.randn(rows, shape.D, device="cuda", dtype=dtype)
    w = torch.randn(shape.D, columns, device="cuda", dtype=dtype)
    grad = torch.randn(rows, columns, device="cuda", dtype=dtype)
    return lambda: x @ w, lambda: (x @ w, grad @ w.t(), x.t() @ grad)


def check(layer: Inputs) -> dict[str, float]:
    """Relative RMS difference of the output and of each gradient to the reference; raises if one is too large."""
    names = ("out", "x", "topk_weights", "gate_up", "up", "down")
    errors = {}
    for name, ours, expected in zip(names, step(layer), step(layer, reference), strict=False):
        if ours.numel():
            errors[name] = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
    if not all(error < TOLERANCE for error in errors.values()):
        raise ArithmeticError(f"differs from the reference: {errors}")
    return errors


def measure(name: str, rounds: int, zipf: float) -> dict[str, Any]:
    shape = SHAPES[name]
    layer = inputs(shape, torch.bfloat16, "cuda", zipf)
    errors = check(layer)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() / 2**30
    peak = (peak_gib(lambda: step(layer)) or before) - before
    dense_forward, dense_step = dense(shape, torch.bfloat16)
    functions = {
        "dense_forward": dense_forward,
        "forward": lambda: forward(layer, False),
        "training_forward": lambda: forward(layer, True),
        "dense_step": dense_step,
        "step": lambda: step(layer),
    }
    times = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            times[key].append(queued_ms(function))

    def ratio(key: str, baseline: str) -> float:
        return statistics.median(b / t for b, t in zip(times[baseline], times[key], strict=True))

    return {
        "shape": name,
        "zipf": zipf,
        **{f"{key}_ms": statistics.median(values) for key, values in times.items()},
        "forward_ratio": ratio("forward", "dense_forward"),
        "training_forward_ratio": ratio("training_forward", "dense_forward"),
        "step_ratio": ratio("step", "dense_step"),
        "step_peak_gib": peak,  # over what was allocated before the step
        "forward_host_us": 1e6 * statistics.median(seconds_to_launch(functions["forward"]) for _ in range(9)),
        "worst_error": max(errors.values()),
    }


def seconds_to_launch(function: Callable[[], Any]) -> float:
    """Host time of one call, the device idle before it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def breakdown(name: str, zipf: float) -> list[dict[str, Any]]:
    """GPU time of each kernel of one step, in launch order of first appearance."""
    layer = inputs(SHAPES[name], torch.bfloat16, "cuda", zipf)
    step(layer)
    repeats = 3
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step(layer)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return [
        {
            "shape": name,
            "kernel": event.key[:60],
            "launches": event.count // repeats,
            "us": event.self_device_time_total / repeats,
        }
        for event in events
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["B", "C", "D"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zipf", type=float, default=0.0)
    arguments = parser.parse_args()
    rows, kernels = [], []
    for name in arguments.shapes:
        rows.append(measure(name, arguments.rounds, arguments.zipf))
        kernels += breakdown(name, arguments.zipf)
        torch.cuda.empty_cache()
    report.append("training_step", rows, rounds=arguments.rounds, kernels=kernels)
    report.print_table("kernels of one training step", kernels)
    report.print_table("one expert MLP, bfloat16", rows)


if __name__ == "__main__":
    main()
