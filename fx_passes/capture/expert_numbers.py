"""The number of the expert of the iteration as a Python integer or as text.

    e = expert_idx.item()    int(expert_idx)    self[f"expert_{expert_idx[0]}"]

What Python does with a number may depend on its value: a hit loop then has one iteration an expert. Where the number is
that of a token's expert, `ids[t, k].item()`, it is said why that is left.
"""

from typing import Any

from torch import fx
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.tensor import TensorVariable

from fx_passes.capture.stand_in import is_module_list
from fx_passes.capture.variables import expert_of_variable, rank_of
from fx_passes.facts.ids import num_columns
from fx_passes.graph.ops import arg, fake_tensor, op_name

_ENTRIES = frozenset(("getitem", "select", "squeeze", "view", "reshape", "to", "long", "int"))
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


def subscript(capture: Any, tx: Any, _instruction: Any) -> bool:
    """`experts[ids[t, k]]`, which asks for the number; `for e in torch.arange(E)`, whose numbers are tensors, too."""
    experts, index = tx.stack[-2].realize(), tx.stack[-1].realize()
    if not is_module_list(experts) or not isinstance(index, TensorVariable) or not isinstance(index.proxy, fx.Proxy):
        return False
    if not reject_single(capture, tx, index.as_proxy().node) and expert_of_variable(index) is None:
        detail = (
            "an expert is looked up by a number that is a tensor: accepted are the numbers of `range` and those hit"
        )
        capture.reject(tx, "loop_is_over_the_experts", detail)
    return False


def reject_single(capture: Any, tx: Any, node: fx.Node) -> bool:
    """Says so where Python reads the experts of single tokens: `experts[ids[t, k].item()](x[t])`, `ids.tolist()`."""
    while op_name(node) in _ENTRIES and fake_tensor(arg(node, 0, "input")) is not None and num_columns(node) is None:
        node = arg(node, 0, "input")
    if num_columns(node) is None:
        return False
    detail = "a token's expert is read as a Python number: tokens are computed one by one, not expert by expert"
    capture.reject(tx, "loop_is_over_the_experts", detail)
    return True
