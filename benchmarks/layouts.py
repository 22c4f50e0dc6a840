"""What the layout of the experts' parameters costs: python -m benchmarks.layouts D.

One expert MLP with its weights stacked, transposed (`[E, in, out]`), with gate and up interleaved, and in tensors of
their own for each expert (gate and up in one, or apart as nn.Linear modules have them). All take turns; a ratio is
stacked time over theirs within a round, the median over rounds is reported. Lists cost the host time for every tensor:
where step_host_ms comes near the step's time, it is the host that is timed. Results are checked against the reference
first.
"""

import argparse
import functools
import random
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import offline, report
from benchmarks.difference import relative_rms
from benchmarks.shapes import SHAPES, Inputs, inputs, placeholders, shape_names
from benchmarks.timing import queued_ms
from benchmarks.training_step import expected_step, seconds_to_launch
from registrations.library import OPS
from scatter_ops import cuda

TOLERANCE = 1e-2  # relative RMS difference to the reference on the same bfloat16 inputs
Parameters = tuple[list[Tensor], list[Tensor], list[Tensor], str, bool]  # gate_up, up, down, layout, transposed


def layouts(layer: Inputs) -> dict[str, Parameters]:
    gate_up, down = layer.gate_up.detach(), layer.down.detach()
    gate, up = gate_up.chunk(2, dim=1)
    interleaved = torch.stack((gate, up), dim=2).flatten(1, 2)

    def apart(stack: Tensor) -> list[Tensor]:
        """One tensor an expert, not equally spaced."""
        return [
            torch.empty(2 + e % 3, *w.shape, dtype=w.dtype, device=w.device)[1].copy_(w) for e, w in enumerate(stack)
        ]

    result: dict[str, Parameters] = {
        "stacked": ([gate_up], [], [down], "concatenated", False),
        "transposed": (
            [gate_up.transpose(1, 2).contiguous()],
            [],
            [down.transpose(1, 2).contiguous()],
            "concatenated",
            True,
        ),
        "interleaved": ([interleaved], [], [down], "interleaved", False),
        "list": (apart(gate_up), [], apart(down), "concatenated", False),
        "list, gate and up apart": (apart(gate), apart(up), apart(down), "separate", False),
    }
    for groups in result.values():
        for parameter in (*groups[0], *groups[1], *groups[2]):
            parameter.requires_grad_()
    return result


def forward(layer: Inputs, parameters: Parameters) -> Tensor:
    gate_up, up, down, layout, transposed = parameters
    order, offsets = OPS.route(layer.topk_ids, layer.down.shape[0])
    weights = (gate_up, up, down, [], [], [])
    return OPS.mlp(layer.x, layer.topk_weights, order, offsets, *weights, "silu", layout, transposed)


def inference(layer: Inputs, parameters: Parameters) -> Tensor:
    with torch.no_grad():
        return forward(layer, parameters)


def step(layer: Inputs, parameters: Parameters) -> tuple[Tensor, ...]:
    """Output, and gradients of x, topk_weights and the parameters."""
    out = forward(layer, parameters)
    gate_up, up, down, *_ = parameters
    return out, *torch.autograd.grad(out, (layer.x, layer.topk_weights, *gate_up, *up, *down), layer.grad_out)


def precompile(name: str) -> None:
    """Fill Triton's disk cache with the kernels of every layout, several at a time, before the GPU is used."""
    layer, launched = _small(name), []
    for gate_up, up, down, layout, transposed in layouts(layer).values():
        with offline.recorded((9, 0), SHAPES[name].rows_per_expert) as launches, torch.no_grad():
            routing = cuda.route(layer.topk_ids, layer.down.shape[0])
            weights, options = (gate_up, up, down, [], [], []), ("silu", layout, transposed, "output", 1.702, 7.0, None)
            arguments = (layer.x, layer.topk_weights, *routing, *weights, *options)
            cuda.mlp_forward(*arguments, False, False)
            _, h, _ = cuda.mlp_forward(*arguments, True, False)
            needs = [True, True, True, bool(up), True, False, False, False]
            cuda.mlp_backward(layer.grad_out, h, None, *arguments, needs)
        launched += launches
    print(f"{name}: {offline.compile_in_parallel(launched)} kernels compiled", flush=True)


def _small(name: str) -> Inputs:
    """Few tokens and experts, whose numbers aren't part of a compiled product."""
    return placeholders(SHAPES[name]._replace(T=1024, E=16), torch.bfloat16)


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    layer = inputs(SHAPES[name], torch.bfloat16, "cuda")
    for tensor in (layer.x, layer.topk_weights):
        tensor.requires_grad_()
    expected = expected_step(layer)[:3]  # gradients of parameters differ in their layout
    given, errors = layouts(layer), {}
    for layout, parameters in given.items():
        pairs = zip(step(layer, parameters)[:3], expected, strict=True)
        errors[layout] = max(relative_rms(a, b) for a, b in pairs)
        if not errors[layout] < TOLERANCE:
            raise ArithmeticError(f"{layout}: relative RMS difference to the reference {errors[layout]:.3g}")
        print(f"{name}, {layout}: checked", flush=True)
    del expected
    times: dict[tuple[str, str], list[float]] = {(layout, what): [] for layout in given for what in ("forward", "step")}
    functions = {"forward": inference, "step": step}
    order = list(times)
    for _ in range(rounds):
        random.shuffle(order)  # what runs before it changes the clock that a layout finds
        for layout, what in order:
            times[layout, what].append(queued_ms(functools.partial(functions[what], layer, given[layout])))
    rows = []
    for layout in given:
        row: dict[str, Any] = {"shape": name, "layout": layout, "worst_error": errors[layout]}
        for what in functions:
            row[f"{what}_ms"] = statistics.median(times[layout, what])
            ratios = (s / t for s, t in zip(times["stacked", what], times[layout, what], strict=True))
            row[f"{what}_ratio"] = statistics.median(ratios)
        launch = functools.partial(step, layer, given[layout])
        row["step_host_ms"] = 1e3 * statistics.median(seconds_to_launch(launch) for _ in range(rounds))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; B, C and D if none is named")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    names = shape_names(parser, arguments.shapes)
    for name in names:
        precompile(name)
    for name in names:
        rows += measure(name, arguments.rounds)
        torch.cuda.empty_cache()
    report.append("layouts", rows, rounds=arguments.rounds)
    report.print_table("layouts of the experts' parameters, bfloat16", rows)


if __name__ == "__main__":
    main()
