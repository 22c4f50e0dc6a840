"""Functions that are left alone where they run for a caller that overwrites what their experts read.

A region that later writes of the frame speak against is left to Dynamo, which then breaks the graph within it, or runs
the whole frame in eager. The functions that it had traced inline become frames of their own, where these writes can't
be seen: the region would be rewritten there after all, and backward would miss what was overwritten. For other callers
these functions are rewritten: they are guarded by who runs them.
"""

import functools
import logging
import sys
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch._dynamo.eval_frame import reset_code
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.resume_execution import ContinueExecutionCache
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.utils import orig_code_map
from torch._guards import Guard

log = logging.getLogger("scatter_moe")

RULE = "tensors_for_backward_stay_as_they_are"

_callers: WeakKeyDictionary[CodeType, WeakSet[CodeType]] = WeakKeyDictionary()
"""By function that is left alone, for whom."""


def callees_at(tx: Any) -> tuple[CodeType, ...]:
    """The functions that are being traced inline, down to that of `tx`."""
    codes = []
    while tx.parent is not None:
        codes.append(tx.f_code)
        tx = tx.parent
    return tuple(codes)


def leave_alone(callees: tuple[CodeType, ...], caller: CodeType) -> None:
    """From now on, where `caller` runs them, whatever was compiled of them before."""
    for code in callees:
        if code not in _callers:
            _callers[code] = WeakSet()
            reset_code(code)
        _callers[code].add(_as_written(caller))


def is_left_alone(output: Any) -> bool:
    """Whether the frame that is being traced is left alone. Guards what that depends on."""
    callers = _callers.get(_as_written(output.root_tx.f_code))
    if callers is None:
        return False
    left = _are_running(callers)
    if left:
        code = output.root_tx.f_code
        log.info("left as it is: what runs %s writes, after its experts, to what they read", code.co_qualname)
    output.guards.add(Guard(GlobalStateSource(), functools.partial(_guard, callers, left)))
    return left


def _guard(callers: WeakSet[CodeType], left: bool, builder: GuardBuilder, guard: Guard) -> None:
    builder.guard_manager.root.add_lambda_guard(
        lambda _: _are_running(callers) == left,
        [f"{'some' if left else 'none'} of {[code.co_qualname for code in callers]} runs this"],
        guard.user_stack,
    )


def _are_running(callers: WeakSet[CodeType]) -> bool:
    """Whether one of these functions is further up in the stack of this thread."""
    frame = sys._getframe(1)
    while frame is not None and _as_written(frame.f_code) not in callers:
        frame = frame.f_back
    return frame is not None


def _as_written(code: CodeType) -> CodeType:
    """The user's code that Dynamo made this of: compiled code of a frame, or of what follows a graph break."""
    code = orig_code_map.get(code, code)
    resumed = ContinueExecutionCache.generated_code_metadata.get(code)
    return code if resumed is None else resumed.code
