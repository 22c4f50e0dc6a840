"""`explain(model, *inputs)`: which regions of a model are rewritten, which candidates are not, and why."""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fx_passes.entry.backend import backend_for_report
from fx_passes.region import Rejection
from fx_passes.report import RegionReport, Report, collecting
from scatter_moe.transformers.own_path import notes_on

_HEADERS = ("module", "form", "E", "K", "activation", "op", "source", "code")
_WIDTH_WITHOUT_TERMINAL = 120


class Explanation:
    """What the backend does to a model. `str(explanation)` is the printed table.

    Attributes:
        regions: one `RegionReport` for each rewritten region (form, module_path, source, code, num_experts, top_k,
            activation, op, deviations).
        rejections: one `Rejection` for each candidate left alone (rule, detail, source, code, module_path).
        graphs: how many graphs the model was compiled to.
        notes: experts that transformers doesn't give to the implementation that was asked for, or that no rewrite
            applies to.
    """

    def __init__(self, report: Report, notes: Sequence[str] = ()) -> None:
        self.regions: list[RegionReport] = report.regions
        self.rejections: list[Rejection] = report.rejections
        self.graphs = report.graphs
        self.notes = list(notes)

    @property
    def summary(self) -> str:
        """How many regions and graphs, in one line."""
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return f"{len(self.regions)} rewritten, {len(self.rejections)} left as they are, {graphs}"

    def __str__(self) -> str:
        lines = [f"scatter_moe: {self.summary}"]
        lines += _table([_row(region) for region in self.regions]) if self.regions else []
        for deviation in dict.fromkeys(deviation for region in self.regions for deviation in region.deviations):
            lines.append(f"  deviation: {deviation}")
        for rejection in self.rejections:
            lines.append("  left as it is: " + f"{rejection.module_path} {rejection}".strip())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compiles and runs `model(*args, **kwargs)` once as the backend would, and says what happened.

    No inner compiler is used.

    Args:
        model: a module or a function.
        args, kwargs: inputs that the model is called with.

    Returns:
        An `Explanation`; it is printed too.

    Raises:
        TypeError: `model` can't be called.
    """
    if not callable(model):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a module or a function")
    with collecting() as report:
        torch.compile(model, backend=backend_for_report())(*args, **kwargs)
    explanation = Explanation(report, list(notes_on(model)) if isinstance(model, nn.Module) else [])
    print(explanation)  # noqa: T201  (showing it is what the function is for)
    return explanation


def _row(region: RegionReport) -> tuple[str, ...]:
    return (
        region.module_path or "-",
        region.form,
        str(region.num_experts),
        str(region.top_k),
        region.activation,
        region.op,
        os.path.basename(region.source),
        region.code,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines no wider than the terminal."""
    widths = [max(len(row[column]) for row in [_HEADERS, *rows]) for column in range(len(_HEADERS))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [_HEADERS, *rows]
    ]
    columns = shutil.get_terminal_size(fallback=(_WIDTH_WITHOUT_TERMINAL, 24)).columns
    return [line if len(line) <= columns else line[: columns - 3] + "..." for line in lines]
