"""What the first training step of a compiled model costs, by the number of experts: python -m benchmarks.compile_time.

The kinds of models are those of `benchmarks.compile_models`; the time of stack_experts counts, too. Kinds and sizes
take turns; each measurement is a fresh process, forked from one that has imported PyTorch and this package and has run
nothing. PyTorch's compile caches are off.

The inner compiler is aot_eager unless told otherwise: then the time is that of Dynamo, of the rewrite and of
AOTAutograd, and no C++ compiler hides it. With --inner inductor Inductor's share of the elapsed time is measured, too.
Ratios are of CPU seconds, which other people's load changes less than elapsed time, and once more of elapsed seconds.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from rich.progress import track

from benchmarks import report
from benchmarks.compile_models import FF, KINDS, D, K, T
from benchmarks.first_step import measure

EXPERTS = (8, 32, 128, 256)
LAYERS, MANY_LAYERS = 4, 24
MANY = (("stacked", 8), ("routed dense", 8), ("dense", 1), ("qwen3", 8), ("qwen3 dense", 1))
"""Kinds and numbers of experts of many layers."""

SETTINGS = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

Cell = tuple[str, int, int]
"""Kind, experts, layers."""


def processes() -> ProcessPoolExecutor:
    """Runs one call at a time, each in a fresh process."""
    os.environ.update(SETTINGS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    return ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1)


def summary(measured: dict[Cell, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians over the processes of a cell, the least CPU seconds, and the ratios that its kind is judged by."""
    medians = {
        cell: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for cell, runs in measured.items()
    }
    rows = []
    for cell, runs in measured.items():
        kind, num_experts, num_layers = cell
        least = min(run["cpu_seconds"] for run in runs)
        row = {"kind": kind, "experts": num_experts, "layers": num_layers, **medians[cell], "least_cpu_seconds": least}
        for name, base in bases(cell, measured).items():
            row[name] = row["cpu_seconds"] / medians[base]["cpu_seconds"]
            row[f"{name}, elapsed"] = row["seconds"] / medians[base]["seconds"]
        rows.append(row)
    return rows


def bases(cell: Cell, cells: Sequence[Cell] | dict[Cell, Any]) -> dict[str, Cell]:
    """The cells, of those that are measured, that one is compared with."""
    kind, num_experts, num_layers = cell
    found = {}
    if kind in ("modules", "one buffer"):
        found["of floor"] = ("floor", num_experts, num_layers)
    if kind in ("stacked", "one buffer"):
        found["of fewest experts"] = (kind, min(e for k, e, n in cells if (k, n) == (kind, num_layers)), num_layers)
    if kind == "stacked":
        found["of routed dense"] = ("routed dense", num_experts, num_layers)
        found["of dense"] = ("dense", 1, num_layers)
    if kind == "qwen3":
        found["of qwen3 dense"] = ("qwen3 dense", 1, num_layers)
    return {name: base for name, base in found.items() if base in cells and base != cell}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["stacked", "modules", "one buffer", "floor"], choices=KINDS)
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--many-layers", type=int, default=MANY_LAYERS, help="of models and dense twins; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after them no further round begins")
    parser.add_argument("--inner", default="aot_eager", help="the inner compiler")
    arguments = parser.parse_args()
    cells = [(kind, e, arguments.layers) for e in arguments.experts for kind in arguments.kinds]
    if arguments.many_layers:
        cells += [(kind, e, arguments.many_layers) for kind, e in MANY]
    measured: dict[Cell, list[dict[str, float]]] = {cell: [] for cell in cells}
    start, loads = time.monotonic(), [os.getloadavg()[0]]
    with processes() as pool:
        while len(loads) <= arguments.rounds and time.monotonic() - start < 60 * arguments.minutes:
            for cell in track(cells, f"round {len(loads)}"):
                measured[cell].append(pool.submit(measure, arguments.inner, *cell).result())
            loads.append(os.getloadavg()[0])
    rows = summary(measured)
    sizes = {"T": T, "D": D, "F": FF, "K": K}
    settings = {"rounds": len(loads) - 1, "inner": arguments.inner, "sizes": sizes, "load_averages": loads}
    report.append("compile_time", rows, **settings)
    report.print_table("first training step of a compiled model", rows)


if __name__ == "__main__":
    main()
