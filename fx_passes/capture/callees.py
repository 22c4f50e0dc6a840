"""Functions that are left alone because of what a caller does once they have run its experts.

A region that a caller's later writes speak against is left to Dynamo, which then breaks the graph within it. Functions
that were traced inline become frames of their own, where these writes can't be seen: the region would be rewritten
there after all, and backward would miss what was overwritten.
"""

from collections.abc import Iterable
from types import CodeType
from typing import Any
from weakref import WeakSet

from fx_passes.region import Rejection
from fx_passes.report import is_of_torch, source_line

RULE = "tensors_for_backward_stay_as_they_are"
_DETAIL = "a function that calls this one writes, after the experts, to what they read"

_left: WeakSet[CodeType] = WeakSet()


def callees_at(tx: Any) -> tuple[CodeType, ...]:
    """The user's functions that are being traced inline, down to that of `tx`."""
    codes = []
    while tx.parent is not None:
        codes.append(tx.f_code)
        tx = tx.parent
    return tuple(code for code in codes if not is_of_torch(code.co_filename))


def leave_alone(codes: Iterable[CodeType]) -> None:
    """From now on, wherever they are frames of their own."""
    _left.update(codes)


def why_left(code: CodeType) -> Rejection | None:
    """What to say of a frame of this code that is left alone."""
    if code not in _left:
        return None
    return Rejection(RULE, _DETAIL, *source_line(code.co_filename, code.co_firstlineno))
