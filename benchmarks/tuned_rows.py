"""What the winners of `benchmarks.tune` become: rows of a device family's JSON file, before the rows of wider ranges.

A winner's row holds for its shape class alone, and takes the place of an earlier winner's.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scatter_ops.tuning import Config, ShapeClass

LEAST_GAIN = 0.02  # of the time of the configuration in use: less is noise


def row_of(op: str, shape: ShapeClass, dtype: torch.dtype, config: Config, **products: Any) -> dict[str, Any]:
    """The row by which `tuning.select` finds this configuration for this shape class.

    products: precision and k_major, of float32.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    changed = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    ranges = {name: [size, size] for name, size in shape._asdict().items()}
    return {"op": op, "dtypes": [str(dtype).removeprefix("torch.")], **products, **ranges, "config": changed}


def winners(measured: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows that `tune` measured the fastest of each shape and phase, where it beats the one in use clearly."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in measured:
        if "ms" in row:
            groups.setdefault((row["shape"], row["phase"]), []).append(row)
    found = []
    for rows in groups.values():
        best = min(rows, key=lambda row: row["ms"])
        in_use = next((row["ms"] for row in rows if row["in_use"]), float("inf"))
        if best["ms"] < (1 - LEAST_GAIN) * in_use:
            found.append(dict(best))
    return found


def merged(known: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows first, then the known ones for anything else: the first row that matches wins."""

    def key(row: Mapping[str, Any]) -> str:
        return json.dumps({name: value for name, value in row.items() if name != "config"})

    replaced = {key(row) for row in new}
    return [*new, *(row for row in known if key(row) not in replaced)]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row on two lines: what it matches, and the configuration."""
    text = []
    for row in rows:
        matches = json.dumps({name: value for name, value in row.items() if name != "config"})
        text.append(f'  {matches[:-1]},\n   "config": {json.dumps(row["config"])}}}')
    path.write_text("[\n" + ",\n".join(text) + "\n]\n")
