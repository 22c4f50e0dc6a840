"""Statistics over training, and a picture of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scatter_moe.routers.statistics import RouterStatistics, Snapshot, track

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class History:
    """Snapshots of a model's routers, step by step. They stay on the device until they are drawn or read.

        history = History(model)
        for step, batch in enumerate(data):
            ...
            history.record(step)
        history.draw("routers.png")

    Args:
        model: its routers are tracked (see `track`) from here on.

    Attributes:
        steps: the recorded steps.
        snapshots: for each router's name, a `Snapshot` for each of them; counts are those since the step before.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._statistics: dict[str, RouterStatistics] = track(model)
        self.steps: list[int] = []
        self.snapshots: dict[str, list[Snapshot]] = {name: [] for name in self._statistics}

    def record(self, step: int) -> None:
        """Keeps what was counted since the last call and starts counting anew. No wait for the device."""
        self.steps.append(step)
        for name, statistics in self._statistics.items():
            self.snapshots[name].append(statistics.snapshot())
            statistics.reset()

    def stacked(self, name: str) -> Snapshot:
        """One router's history on the CPU: each field with a first dimension of recorded steps."""
        return Snapshot(*(torch.stack(field).cpu() for field in zip(*self.snapshots[name], strict=True)))

    def draw(self, path: str | Path | None = None, title: str = "") -> "Figure":
        """One row a router: each expert's share of the tokens, entropy, dropped share and dead experts, over the steps.

        Args:
            path: where the picture is saved; None saves nothing.
            title: its heading.

        Returns:
            The matplotlib figure.

        Raises:
            ModuleNotFoundError: matplotlib is missing; the extra `plots` has it.
            ValueError: nothing was recorded.
        """
        if not self.steps:
            raise ValueError("history: nothing was recorded, call record(step) first")
        figure_class = _figure_class()
        figure = figure_class(figsize=(13, 0.6 + 2.4 * len(self.snapshots)), layout="constrained")
        figure.suptitle(title)
        rows = figure.subplots(len(self.snapshots), 4, squeeze=False, sharex=True, width_ratios=(3, 2, 2, 2))
        for row, name in zip(rows, self.snapshots, strict=True):
            self._draw_row(row, name)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        return figure

    def _draw_row(self, row: Any, name: str) -> None:
        history = self.stacked(name)
        shares, *curves = row
        counts = history.tokens_per_expert.double()
        even = counts.sum(1, keepdim=True).clamp(min=1) / counts.shape[1]
        edges = [*self.steps, self.steps[-1] + 1]
        image = shares.pcolormesh(edges, range(counts.shape[1] + 1), (counts / even).T.numpy(), vmin=0, cmap="viridis")
        shares.figure.colorbar(image, ax=shares, label="load (1 is even)")
        shares.set(ylabel=f"{name or 'router'}\nexpert", xlabel="step")
        labels = ("entropy (nats)", "dropped share", "dead experts")
        values = (history.entropy, history.dropped_share, history.dead_experts)
        for axes, label, curve in zip(curves, labels, values, strict=True):
            axes.plot(self.steps, curve.numpy())
            axes.set(xlabel="step", ylabel=label)
            axes.set_ylim(0, 1.05 * max(1.0, curve.max().item()))


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'scatter-moe[plots]'") from missing
    return Figure
