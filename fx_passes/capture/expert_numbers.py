"""The number of the expert of the iteration as a Python integer or as text.

    e = expert_idx.item()    int(expert_idx)    self[f"expert_{expert_idx[0]}"]

What Python does with a number may depend on its value: a hit loop then has one iteration an expert.
"""

from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable

from fx_passes.capture.variables import expert_of_variable, rank_of

_WITH_CONVERSION = 0b111
"""Flags of FORMAT_VALUE: `!r` or the like, and a format."""


def format_value(capture: Any, tx: Any, instruction: Any) -> bool:
    """`f"{expert}"`, where `expert` is a scalar: as its number is written."""
    expert = tx.stack[-1].realize()
    plain = not (instruction.arg or 0) & _WITH_CONVERSION
    if plain and expert_of_variable(expert) is not None and rank_of(expert) == 0:
        tx.stack[-1] = number(capture, expert) or tx.stack[-1]
    return False


def number(capture: Any, variable: Any) -> VariableTracker | None:
    """`expert.item()` or `int(expert)`, if `variable` stands for one. A hit loop of but one iteration is unrolled."""
    expert = expert_of_variable(variable)
    if expert is None or not capture.is_in_iteration_of(expert):
        return None
    if isinstance(expert, int):
        return ConstantVariable.create(expert)
    loop = next((scope for scope in capture.scopes if scope.symbol is expert), None)
    if loop is not None:
        capture.trace_again_unrolled([loop.event])
    return None
