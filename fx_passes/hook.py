"""The one place where Dynamo is extended.

Dynamo traces a frame instruction by instruction in `InstructionTranslatorBase.step`. The wrapper below leaves every frame alone whose compiler is
not our backend. Where the symbol is missing (another PyTorch), `install` says so once and naive loops that Dynamo cannot trace stay eager.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from torch._dynamo import symbolic_convert

from fx_passes.capture import Capture

log = logging.getLogger("scatter_moe")

_CAPTURE = "scatter_moe_capture"


def install(is_ours: Callable[[Any], bool]) -> bool:
    """Wrap Dynamo's `step` once. `is_ours(compiler_fn)` tells whether a frame is traced for our backend."""
    translator = getattr(symbolic_convert, "InstructionTranslatorBase", None)
    original = getattr(translator, "step", None)
    if translator is None or original is None:
        log.warning("this PyTorch has no InstructionTranslatorBase.step: loops over hit experts stay as they are; range loops are still rewritten")
        return False
    if hasattr(original, "scatter_moe_original"):
        return True

    @functools.wraps(original)
    def step(self: Any) -> bool:
        capture = _capture_of(self.output, is_ours)
        return original(self) if capture is None else capture.step(self, original)

    step.scatter_moe_original = original  # pyright: ignore[reportAttributeAccessIssue]
    translator.step = step
    return True


def current_capture() -> Capture | None:
    """The capture of the frame that is being traced in this thread."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    return getattr(tx.output, _CAPTURE, None) if tx is not None else None


def _capture_of(output: Any, is_ours: Callable[[Any], bool]) -> Capture | None:
    if not hasattr(output, _CAPTURE):
        setattr(output, _CAPTURE, Capture(output) if is_ours(output.compiler_fn) else None)
    return getattr(output, _CAPTURE)
