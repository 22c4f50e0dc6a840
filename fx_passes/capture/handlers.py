"""What is done at which bytecode instruction of a frame that is traced."""

from collections.abc import Callable
from typing import Any

from fx_passes.capture import (
    bounds,
    branches,
    counts,
    expert_loops,
    expert_numbers,
    index_list,
    indexing,
    loops,
    parts,
    segments,
)

Handler = Callable[[Any, Any, Any], bool]
"""Looks at (capture, tx, instruction) before the instruction runs; True where it did the instruction's work itself."""


def _subscript(capture: Any, tx: Any, instruction: Any) -> bool:
    return any(
        known.subscript(capture, tx, instruction) for known in (segments, counts, loops, indexing, expert_numbers)
    )


def _store_subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    index_list.index_by_tensors(tx)
    segments.index_by_places(capture, tx)
    return False


_HANDLERS: dict[str, Handler] = {
    "GET_ITER": loops.get_iter,
    "FOR_ITER": loops.for_iter,
    "CALL": expert_loops.call,
    "BINARY_SUBSCR": _subscript,
    "BINARY_SLICE": segments.binary_slice,
    "BUILD_SLICE": bounds.build_slice,
    "STORE_SUBSCR": _store_subscript,
    "STORE_SLICE": segments.store_slice,
    "UNPACK_SEQUENCE": indexing.unpack,
    "LIST_APPEND": parts.list_append,
    "FORMAT_VALUE": expert_numbers.format_value,
    "FORMAT_SIMPLE": expert_numbers.format_value,
}


def handler_of(opname: str) -> Handler | None:
    """What looks at instructions of this name before they run."""
    if "JUMP" in opname and "IF" in opname:
        return branches.jump
    return _HANDLERS.get(opname)
