"""`scatter-moe explain`: runs a model once through the backend and keeps what was decided."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fx_passes.entry.backend import backend_for_report
from fx_passes.report import collecting
from scatter_moe.cli.errors import first_line
from scatter_moe.cli.targets import OWN_CODE, Target, from_config, from_factory
from scatter_moe.explain import Explanation
from scatter_moe.transformers.own_path import notes_on


@dataclass(frozen=True)
class Outcome:
    """What was decided about a target.

    Attributes:
        stopped: why the run ended early; None if it didn't. On the meta device a loop that is left alone can't run,
            since its trip count is a value.
    """

    target: Target
    explanation: Explanation
    stopped: str | None

    @property
    def all_rewritten(self) -> bool:
        return bool(self.explanation.regions) and not self.explanation.rejections and self.stopped is None

    @property
    def hint(self) -> str | None:
        """What to try where there is nothing to show."""
        if self.stopped and self.target.device == "meta":
            return "a loop that is left alone can't run without values: try --device cpu with few --layers"
        if self.explanation.regions or self.target.experts in (None, "eager"):
            return None
        if self.target.experts == OWN_CODE:
            return "no experts implementation applies to this model: transformers always runs its own code"
        if self.target.experts == "scatter_moe":
            return "transformers calls the operators itself: nothing is left to rewrite"
        return f"transformers runs experts_implementation={self.target.experts!r} here: try --experts eager"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "target": self.target.name,
            "layers": self.target.layers,
            "experts_implementation": self.target.experts,
            "graphs": self.explanation.graphs,
            "rewritten": [asdict(region) for region in self.explanation.regions],
            "left": [asdict(rejection) for rejection in self.explanation.rejections],
            "stopped": self.stopped,
            "notes": self.explanation.notes,
            "hint": self.hint,
        }


def run(options: argparse.Namespace, announce: Callable[[str], None]) -> Outcome:
    """Loads the target of the command line and compiles it once; `announce` is told each step."""
    announce(f"loading {options.target}")
    target = from_factory(options.target) if ":" in options.target else from_config(options)
    announce(f"tracing {target.name}")
    stopped = None
    with collecting() as report:
        try:
            torch.compile(target.model, backend=backend_for_report())(*target.args, **target.kwargs)
        except Exception as error:  # noqa: BLE001  of the model's own code, or Dynamo's word on it: part of the outcome
            stopped = f"{type(error).__name__}: {first_line(error)}"
    notes = list(notes_on(target.model)) if isinstance(target.model, nn.Module) else []
    return Outcome(target, Explanation(report, notes), stopped)
