"""The fused expert MLP on the CPU against plain PyTorch: python -m benchmarks.cpu.

Everyone goes from (x, topk_weights, topk_ids) to y, and in a training step back to the gradients of x, topk_weights and
both weights. Ours and the rivals take turns, each of several calls, as a model with several layers makes them. A round
is a process of its own: where memory happens to lie changes a small product's time by tens of percent for as long as
the process runs, and ratios by several. A ratio is a rival's time over ours within a round; of the medians over rounds
the smallest is reported, that of the fastest rival. `implementation` is what ours calls in the end, called at once: the
difference is PyTorch's way from Python to an operator and back, in a training step also autograd. In each row
everyone's result is checked against the reference first: nothing is timed otherwise. `floor` is the implementation
after a call of two operators that do nothing, with the arguments of ours: about what operators of these schemas take at
least with these functions.

Times are the process' CPU time: with OMP_NUM_THREADS=1 it is the elapsed time of an idle machine, and other people's
load changes it less. Compare ratios only.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

import registrations  # noqa: F401  registers the operators
from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.shapes import Inputs, Shape, inputs
from registrations.mlp import ARGUMENTS
from scatter_ops import cpu, reference

OPS = torch.ops.scatter_moe
NOTHING = torch.library.Library("scatter_moe_nothing", "DEF")
NOTHING.define("route(Tensor topk_ids, int num_experts) -> Tensor")
NOTHING.define(f"mlp({ARGUMENTS}) -> Tensor")
for name in ("route", "mlp"):
    NOTHING.impl(name, lambda first, *rest: first, "CompositeImplicitAutograd")
NOTHING_OPS = torch.ops.scatter_moe_nothing
SHAPES = {
    "T512": Shape(T=512, D=256, F=512, E=8, K=2),
    "T4": Shape(T=4, D=256, F=512, E=8, K=2),
    "decode": Shape(T=1, D=256, F=512, E=64, K=8),
    "narrow": Shape(T=1, D=64, F=128, E=64, K=8),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative RMS difference to the reference
SECONDS_A_ROUND = 0.5
CALLS_A_TURN = 3
FEW_TOKENS = 8
Cell = tuple[str, torch.dtype, Callable[..., tuple[Tensor, ...]]]
"""A shape, a dtype, and `forward` or `step`."""


def ours(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    routing = OPS.route(topk_ids, down.shape[0])
    return OPS.mlp(x, topk_weights, *routing, [gate_up], [], [down], [], [], [], "silu", "concatenated")


def floor(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    ids = NOTHING_OPS.route(topk_ids, down.shape[0])
    weights = [gate_up], [], [down], [], [], []
    NOTHING_OPS.mlp(x, topk_weights, ids, ids, *weights, "silu", "concatenated")
    routing, options = cpu.route(topk_ids, down.shape[0]), ("silu", "concatenated", False, "output", 0.0, 0.0, None)
    return cpu.mlp_forward(x, topk_weights, *routing, *weights, *options, False, False)[0]


def naive_loop(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each expert finds its tokens and adds its rows to the output."""
    out = torch.zeros_like(x)
    for e, (gate_up_e, down_e) in enumerate(zip(gate_up.unbind(0), down.unbind(0), strict=True)):
        tokens, choice = torch.where(topk_ids == e)
        if len(tokens):
            y = gated(x[tokens] @ gate_up_e.t()) @ down_e.t()
            out = out.index_add(0, tokens, y * topk_weights[tokens, choice, None].to(x.dtype))
    return out


def sorted_slices(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One sort, one gather, products on slices, one index_add."""
    order, counts = topk_ids.flatten().argsort(), topk_ids.flatten().bincount(minlength=down.shape[0])
    tokens = order // topk_ids.shape[1]
    slices = zip(x[tokens].split(counts.tolist()), gate_up.unbind(0), down.unbind(0), strict=True)
    y = torch.cat([gated(rows @ gate_up_e.t()) @ down_e.t() for rows, gate_up_e, down_e in slices if len(rows)])
    return torch.zeros_like(x).index_add(0, tokens, y * topk_weights.flatten()[order, None].to(x.dtype))


def grouped_mm(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `sorted_slices`, the loop over experts inside PyTorch."""
    order, counts = topk_ids.flatten().argsort(), topk_ids.flatten().bincount(minlength=down.shape[0])
    tokens, offsets = order // topk_ids.shape[1], counts.cumsum(0).int()
    h = F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=offsets)
    y = F.grouped_mm(gated(h), down.transpose(1, 2), offs=offsets)
    return torch.zeros_like(x).index_add(0, tokens, y * topk_weights.flatten()[order, None].to(x.dtype))


def gathered_weights(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each slot takes a copy of its expert's weights; two batched products. For few tokens."""
    experts, rows = topk_ids.flatten(), x.repeat_interleave(topk_ids.shape[1], 0).unsqueeze(1)
    h = torch.bmm(rows, gate_up[experts].mT)
    y = torch.bmm(gated(h), down[experts].mT).view(*topk_ids.shape, -1)
    return torch.bmm(topk_weights.unsqueeze(1).to(x.dtype), y).squeeze(1)


def slot_loop(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """No sort: two products for each slot. For few tokens, without gradients, whose sums take it very long."""
    pairs = [(row, e) for row, slots in zip(x.unbind(0), topk_ids.tolist(), strict=True) for e in slots]
    y = torch.stack([torch.mv(down[e], gated(torch.mv(gate_up[e], row))) for row, e in pairs])
    return torch.bmm(topk_weights.unsqueeze(1).to(x.dtype), y.view(*topk_ids.shape, -1)).squeeze(1)


def gated(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def contestants(layer: Inputs, run: Callable[..., tuple[Tensor, ...]]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Rivals by name, after ours, its implementation and, without gradients, the floor."""
    few = len(layer.x) <= FEW_TOKENS
    functions = (
        *(ours, naive_loop, sorted_slices, grouped_mm),
        *([gathered_weights] if few else []),
        *([slot_loop] if few and run is forward else []),
    )
    by_name = {function.__name__: partial(run, layer, function) for function in functions}
    return {
        "ours": by_name.pop("ours"),
        "implementation": partial(composed, cpu, layer, run is step, overwrite_h=True),
        **({"floor": partial(run, layer, floor)} if run is forward else {}),
        **by_name,
    }


def forward(layer: Inputs, function: Callable[..., Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (function(layer.x, layer.topk_weights, layer.topk_ids, layer.gate_up, layer.down),)


def step(layer: Inputs, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.topk_weights, layer.gate_up, layer.down)]
    x, topk_weights, gate_up, down = leaves
    out = function(x, topk_weights, layer.topk_ids, gate_up, down)
    out.backward(layer.grad_out)
    return out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def composed(
    implementation: ModuleType, layer: Inputs, with_gradients: bool, **backward_options: bool
) -> tuple[Tensor, ...]:
    """Output and gradients by the functions of an implementation, without operators and autograd."""
    with torch.no_grad():
        routing = implementation.route(layer.topk_ids, layer.down.shape[0])
        weights = ([layer.gate_up], [], [layer.down], [], [], [])
        options = ("silu", "concatenated", False, "output", 0.0, 0.0, None)
        arguments = (layer.x, layer.topk_weights, *routing, *weights, *options)
        out, h, y = implementation.mlp_forward(*arguments, with_gradients, with_gradients)
        if not with_gradients:
            return (out,)
        needs = [True, True, True, False, True, False, False, False]
        grads = implementation.mlp_backward(layer.grad_out, h, y, *arguments, needs, **backward_options)
        return out, *(grad for grad, need in zip(grads, needs, strict=True) if need)


def check(layer: Inputs, everyone: Mapping[str, Callable[[], tuple[Tensor, ...]]]) -> float:
    """Largest relative RMS difference of ours to the reference; raises if anyone's is too large."""
    worst, truth = {}, composed(reference, layer, True)
    for name, function in everyone.items():
        pairs = zip(function(), truth, strict=False)
        worst[name] = max(relative_rms(a, b) for a, b in pairs)
    if not all(error < TOLERANCE[layer.x.dtype] for error in worst.values()):
        raise ArithmeticError(f"differs from the reference: {worst}")
    return worst["ours"]


def one_round(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """Milliseconds of everyone, by name, and the error of ours: a dict for each cell."""
    torch.manual_seed(0)
    return [milliseconds(*cell) for cell in cells]


def milliseconds(name: str, dtype: torch.dtype, run: Callable[..., tuple[Tensor, ...]]) -> dict[str, float]:
    layer = inputs(SHAPES[name], dtype, "cpu")
    everyone = contestants(layer, run)
    error = check(layer, everyone)
    turns = max(3, int(SECONDS_A_ROUND / cpu_seconds(everyone["ours"]) / CALLS_A_TURN / len(everyone)))
    times: dict[str, list[float]] = {key: [] for key in everyone}
    for _ in range(turns):
        for key in random.sample(list(everyone), len(everyone)):
            times[key].append(cpu_seconds(everyone[key]))
    return {"error": error, **{key: 1e3 * statistics.median(values) for key, values in times.items()}}


def summary(cell: Cell, rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    def ratio(key: str, to: str) -> float:
        return statistics.median(times[key] / times[to] for times in rounds)

    rivals = [key for key in rounds[0] if key not in ("ours", "implementation", "floor", "error")]
    ratios = {key: ratio(key, "ours") for key in rivals}
    name, dtype, run = cell
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "what": run.__name__,
        **{f"{key}_ms": statistics.median(r[key] for r in rounds) for key in rounds[0] if key != "error"},
        "fastest rival": min(ratios, key=lambda rival: ratios[rival]),
        "ratio": min(ratios.values()),
        "ratio of the implementation": min(ratio(key, "implementation") for key in rivals),
        "error": max(r["error"] for r in rounds),
    }


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call, of several in a row."""
    start = time.process_time()
    for _ in range(CALLS_A_TURN):
        function()
    return (time.process_time() - start) / CALLS_A_TURN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    cells = [(name, dtype, run) for name in arguments.shapes for dtype in TOLERANCE for run in (forward, step)]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = [processes.submit(one_round, cells) for _ in range(arguments.rounds)]
        rounds = [future.result() for future in track(futures, "measuring")]
    rows = [summary(cell, of_cell) for cell, of_cell in zip(cells, zip(*rounds, strict=True), strict=True)]
    settings = {"rounds": arguments.rounds, "shapes": {name: SHAPES[name]._asdict() for name in arguments.shapes}}
    report.append("cpu", rows, load_average=os.getloadavg()[0], **settings)
    report.print_table("one expert MLP on the CPU; ratio: time of the fastest rival over ours", rows)


if __name__ == "__main__":
    main()
