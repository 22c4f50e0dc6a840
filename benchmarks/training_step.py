"""One expert MLP against dense products of the same FLOPs: python -m benchmarks.training_step C D [--rivals].

In bfloat16 or another --dtype, the dense product in the same one; --precision is PyTorch's for products in float32.

The dense baseline is one [N, D] x [D, 3 F] product, and for the step its two gradients too. Ours goes from (x,
topk_weights, topk_ids) to y, sort included, and by autograd back to the gradients of x, topk_weights and both weights.
Dense, ours and the rivals that are installed take turns in random order; a ratio is dense time over theirs within a
round, the median over rounds is reported. A shape's results are checked against the reference first: nothing is printed
for a shape that fails. Memory is in MiB: `held` is what is kept between forward and backward (x counted, y not), `peak`
is the step's over what was allocated before it; beside each is the least that an implementation without copies needs.
"""

import argparse
import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.rivals import OURS, Implementation, Rival, add_rivals, available, scatter_moe
from benchmarks.shapes import SHAPES, Inputs, Shape, inputs, shape_names
from benchmarks.timing import peak_gib, queued_ms
from scatter_ops import reference

TOLERANCE = 1e-2  # relative RMS difference to the reference on the same inputs, of which products have 8 bits or more
EXACT = 1e-5  # the same where they have 24
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NEEDS = [True, True, True, False, True, False, False, False]
MIB = 2**20


def forward(layer: Inputs, implementation: Implementation = scatter_moe) -> torch.Tensor:
    return implementation(layer.x, layer.topk_weights, layer.topk_ids, layer.gate_up, layer.down)


def inference(layer: Inputs, implementation: Implementation = scatter_moe) -> torch.Tensor:
    with torch.no_grad():
        return forward(layer, implementation)


def step(layer: Inputs, implementation: Implementation = scatter_moe) -> tuple[torch.Tensor, ...]:
    """Output, and gradients of x, topk_weights, gate_up and down."""
    out = forward(layer, implementation)
    differentiated = (layer.x, layer.topk_weights, layer.gate_up, layer.down)
    return out, *torch.autograd.grad(out, differentiated, layer.grad_out.to(out.dtype))


def expected_step(layer: Inputs) -> tuple[torch.Tensor, ...]:
    routing = reference.route(layer.topk_ids, layer.down.shape[0])
    options = ("silu", "concatenated", False, "output", 0.0, 0.0, None)
    arguments = (layer.x, layer.topk_weights, *routing, [layer.gate_up], [], [layer.down], [], [], [], *options)
    with torch.no_grad():
        out, h, _ = reference.mlp_forward(*arguments, True, False)
        grads = reference.mlp_backward(layer.grad_out, h, None, *arguments, NEEDS)
    return out, *(grad for grad, need in zip(grads, NEEDS, strict=True) if need)


def dense(shape: Shape, dtype: torch.dtype) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The products of the forward and of the whole step."""
    rows, columns = shape.T * shape.K, 3 * shape.F
    x = torch.randn(rows, shape.D, device="cuda", dtype=dtype)
    w = torch.randn(shape.D, columns, device="cuda", dtype=dtype)
    grad = torch.randn(rows, columns, device="cuda", dtype=dtype)
    return lambda: x @ w, lambda: (x @ w, grad @ w.t(), x.t() @ grad)


def tolerance(dtype: torch.dtype) -> float:
    return EXACT if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else TOLERANCE


def differences(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Relative RMS difference of the output and of each gradient; raises if one is too large."""
    names = ("out", "x", "topk_weights", "gate_up", "down")
    errors = {}
    for name, ours, truth in zip(names, results, expected, strict=True):
        errors[name] = relative_rms(ours, truth)
    if not all(error < tolerance(results[0].dtype) for error in errors.values()):
        raise ArithmeticError(f"differs from the reference: {errors}")
    return errors


def memory(layer: Inputs, shape: Shape, implementation: Implementation) -> dict[str, float]:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    out = forward(layer, implementation)
    held = torch.cuda.memory_allocated() - before - out.nbytes + layer.x.nbytes + layer.topk_weights.nbytes
    del out
    peak = 1024 * (peak_gib(lambda: step(layer, implementation)) or 0.0) - before / MIB
    size, num_slots = layer.x.element_size(), shape.T * shape.K
    h, routing = num_slots * 2 * shape.F * size, 4 * num_slots + 4 * shape.E
    least_held = layer.x.nbytes + h + layer.topk_weights.nbytes + routing
    least_peak = h + layer.gate_up.nbytes + layer.down.nbytes + num_slots * shape.D * size + 2 * layer.x.nbytes
    return {"held": held / MIB, "least_held": least_held / MIB, "peak": peak, "least_peak": least_peak / MIB}


def measure(name: str, rounds: int, zipf: float, rivals: list[str] | None, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row an implementation: ours, then the rivals."""
    shape = SHAPES[name]
    torch.compiler.reset()  # or rivals would be compiled for sizes of any kind from the second shape on
    layer = inputs(shape, dtype, "cuda", zipf)
    expected = expected_step(layer)
    implementations = {"scatter_moe": OURS, **dict(available(rivals))}
    rows, contestants = {}, {}
    for label, rival in implementations.items():
        own = differentiable(layer, rival)
        try:
            errors = differences(step(own, rival.forward), as_held(expected, rival))
        except (ArithmeticError, RuntimeError, torch.OutOfMemoryError) as error:
            if label == "scatter_moe":
                raise
            print(f"{name}: skipped: {label}: {str(error)[:200]}")
            continue
        kind = {"shape": name, "zipf": zipf, "dtype": name_of(dtype), "implementation": label}
        rows[label] = kind | {"worst_error": max(errors.values())}
        rows[label] |= memory(own, shape, rival.forward)
        contestants[label] = (own, rival.forward)
    del expected
    times = _rounds(dense(shape, dtype), contestants, rounds)
    for label, row in rows.items():
        for what, baseline in (("forward", "forward"), ("training_forward", "forward"), ("step", "step")):
            measured = times[label, what]
            row[f"{what}_ms"] = statistics.median(measured)
            ratios = (b / t for b, t in zip(times["dense", baseline], measured, strict=True))
            row[f"{what}_ratio"] = statistics.median(ratios)
        row["dense_forward_ms"] = statistics.median(times["dense", "forward"])
        row["dense_step_ms"] = statistics.median(times["dense", "step"])
    ours = rows["scatter_moe"]
    ours["forward_host_us"] = 1e6 * statistics.median(seconds_to_launch(lambda: inference(layer)) for _ in range(9))
    return list(rows.values())


def differentiable(layer: Inputs, rival: Rival = OURS) -> Inputs:
    """The same inputs as the rival holds them; all but the ids require gradients."""
    parameters = {
        "x": layer.x,
        "topk_weights": layer.topk_weights,
        "gate_up": rival.gate_up(layer.gate_up),
        "down": layer.down,
    }
    return dataclasses.replace(layer, **{key: value.detach().requires_grad_() for key, value in parameters.items()})


def as_held(expected: tuple[torch.Tensor, ...], rival: Rival) -> tuple[torch.Tensor, ...]:
    out, x, topk_weights, gate_up, down = expected
    return out, x, topk_weights, rival.gate_up(gate_up), down


def name_of(dtype: torch.dtype) -> str:
    """With the precision of products, where that is a setting."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}, {torch.get_float32_matmul_precision()}" if dtype == torch.float32 else name


def _rounds(
    baseline: tuple[Callable[[], Any], Callable[[], Any]],
    contestants: dict[str, tuple[Inputs, Implementation]],
    rounds: int,
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds by (implementation or dense, what), one a round; all take turns, in random order."""
    dense_forward, dense_step = baseline
    functions: dict[tuple[str, str], Callable[[], Any]] = {("dense", "forward"): dense_forward}
    for label, contestant in contestants.items():
        functions[label, "forward"] = functools.partial(inference, *contestant)
        functions[label, "training_forward"] = functools.partial(forward, *contestant)
    functions["dense", "step"] = dense_step
    for label, contestant in contestants.items():
        functions[label, "step"] = functools.partial(step, *contestant)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        # In one order for all rounds, the last would always find the GPU at its hottest.
        for key in random.sample(list(functions), len(functions)):
            times[key].append(queued_ms(functions[key], calls=6))
    return times


def seconds_to_launch(function: Callable[[], Any]) -> float:
    """Host time of one call, the device idle before it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def breakdown(name: str, zipf: float, dtype: torch.dtype) -> list[dict[str, Any]]:
    """GPU time of each kernel of one step, in launch order of first appearance."""
    layer = differentiable(inputs(SHAPES[name], dtype, "cuda", zipf))
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
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; B, C and D if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zipf", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--precision", default="highest", choices=("highest", "high", "medium"))
    add_rivals(parser)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.precision)
    rows, kernels, dtype = [], [], DTYPES[arguments.dtype]
    for name in shape_names(parser, arguments.shapes):
        rows += measure(name, arguments.rounds, arguments.zipf, arguments.rivals, dtype)
        kernels += breakdown(name, arguments.zipf, dtype)
        torch.cuda.empty_cache()
    report.append("training_step", rows, rounds=arguments.rounds, kernels=kernels)
    report.print_table("kernels of one training step", kernels)
    report.print_table(f"one expert MLP, {name_of(dtype)}", rows)


if __name__ == "__main__":
    main()
