"""A fault of this package itself must neither break the user's program nor pass unnoticed.

Dynamo's exceptions (it can't trace something, it starts again) are verdicts on the user's code and go their way. Any
other exception out of `own_code` is a fault of ours: the frame is traced again by Dynamo alone, and the logger
`scatter_moe` warns once with the traceback. Where the environment holds SCATTER_MOE_RAISE_FAULTS, as in our tests, the
exception is raised instead.
"""

import functools
import logging
import os
import traceback
from collections.abc import Callable
from typing import Any

from torch._dynamo.exc import TorchDynamoException

log = logging.getLogger("scatter_moe")

RAISE_FAULTS = "SCATTER_MOE_RAISE_FAULTS"

_told: set[tuple[str, int | None]] = set()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks an entry into this package from Dynamo, of which a fault goes to its first argument, the capture if any."""

    @functools.wraps(function)
    def watched(capture: Any, *args: Any) -> Any:
        try:
            return function(capture, *args)
        except TorchDynamoException:
            raise
        except Exception as error:
            if capture is not None:
                capture.give_up(error)
            raise

    return watched


def are_raised() -> bool:
    return bool(os.environ.get(RAISE_FAULTS))


def warn_of(error: Exception) -> None:
    """Tells the user of a fault, with its traceback, the first time that one comes from this place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    if (place.filename, place.lineno) not in _told:
        _told.add((place.filename, place.lineno))
        text = "an error in scatter-moe itself: code that it can't compile is left to PyTorch alone. Please report it."
        log.warning(text, exc_info=error)
