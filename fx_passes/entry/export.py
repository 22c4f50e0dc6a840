"""torch.export with `strict=False` runs a model's Python and would meet its loops: prepared models go through Dynamo.

The one private place is `torch.export._trace._non_strict_export`; where it is missing, only `strict=True` exports
prepared models.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

log = logging.getLogger("scatter_moe")

_ORIGINAL = "scatter_moe_original"


def extend_export(is_prepared: Callable[[nn.Module], bool]) -> None:
    """Makes the export of modules for which `is_prepared` holds the same, strict or not. Safe to call again."""
    trace = importlib.import_module("torch.export._trace")  # takes half a second
    original = getattr(trace, "_non_strict_export", None)
    if original is None or not hasattr(trace, "_strict_export"):
        log.warning("this PyTorch's torch.export can't be extended: export prepared models with strict=True")
        return
    if hasattr(original, _ORIGINAL):
        return

    @functools.wraps(original)
    def non_strict_export(*, mod: nn.Module, **how: Any) -> Any:
        export = trace._strict_export if is_prepared(mod) else original
        return export(mod=mod, **how)

    setattr(non_strict_export, _ORIGINAL, original)
    trace._non_strict_export = non_strict_export
