"""What every benchmark shares: a record of the environment, a file of results, a table.

A run of a benchmark is one JSON object on one line of ``benchmarks/results/<benchmark>.jsonl``:

    {"benchmark": "models", "time": "...", "command": "...", "environment": {...}, "settings": {...}, "rows": [...]}

Results are only ever appended. ``docs/generate.py`` builds the README's table from the last line of a file.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
VERSIONS_OF = ("torch", "triton", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """The device, the versions and the commit that a result belongs to."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS_OF},
        "commit": _commit(),
    }


def append(benchmark: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> Path:
    """Append one run to ``results/<benchmark>.jsonl`` and return that path. Units belong in the keys (``peak_gib``)."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    record = {
        "benchmark": benchmark,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "environment": environment(),
        "settings": settings,
        "rows": list(rows),
    }
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return path


def load(benchmark: str) -> list[dict[str, Any]]:
    """Every recorded run of a benchmark, oldest first."""
    path = RESULTS / f"{benchmark}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_table(title: str, rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print rows under the union of their keys, in order of first appearance; no figure is cut off to fit a width."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title)
    for column in columns:
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(format_cell(row.get(column)) for column in columns))
    console = console or Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table)


def format_cell(value: Any) -> str:
    """Text of a cell: a dash for what is missing, thousands separated, three significant digits for small numbers."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, ``-dirty`` where tracked files differ; SCATTER_MOE_COMMIT names it where git can't."""
    if "SCATTER_MOE_COMMIT" in os.environ:
        return os.environ["SCATTER_MOE_COMMIT"]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = f"-m {spec.name}" if spec is not None else sys.argv[0]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc-per-node {processes}" if processes else "python"
    return " ".join([launcher, program, *map(shlex.quote, sys.argv[1:])])
