"""What a loop body may do with the expert that stands for all: nothing that tells one expert from another.

In a loop that is traced as one iteration the loop variable is a number without a value, and an expert's module is a
stand-in. Dynamo asks for the value where arithmetic or a branch need it, and fails; but it would also print the number,
look it up in a set, or compare a module's identity. So each instruction that gets one of them as an operand must be on
this list, or the loop is traced expert by expert.
"""

from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builtin import BuiltinVariable
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.functions import BaseUserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import ListVariable, SliceVariable, TupleVariable
from torch._dynamo.variables.misc import GetAttrVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.torch import BaseTorchVariable
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fx_passes.capture.stand_in import roots_of
from fx_passes.capture.variables import expert_of_variable

_OPERANDS = {
    "IS_OP": 2,
    "CONTAINS_OP": 2,
    "COMPARE_OP": 2,
    "BINARY_OP": 2,
    "BINARY_SUBSCR": 2,
    "STORE_SUBSCR": 3,
    "DELETE_SUBSCR": 2,
    "FORMAT_VALUE": 2,
    "FORMAT_SIMPLE": 1,
    "FORMAT_WITH_SPEC": 2,
    "SET_ADD": 1,
    "MAP_ADD": 2,
    "LOAD_ATTR": 1,
    "LOAD_METHOD": 1,
}
_COUNTED = {"BUILD_MAP": 2, "BUILD_SET": 1, "BUILD_CONST_KEY_MAP": 1, "BUILD_STRING": 1, "CALL": 1, "CALL_KW": 1}
_HARMLESS_BUILTINS = frozenset((isinstance, type, callable, super, len))
_STATE_OF_TENSORS = frozenset(("grad", "data", "grad_fn", "data_ptr", "untyped_storage", "storage", "__dict__"))
_NUMBERS = (int, float)


def tells_apart(tx: Any, instruction: Any, symbols: frozenset[Any]) -> bool:
    """Whether the next instruction of `tx` may tell one expert from another; `symbols` are the numbers of the loops."""
    name = instruction.opname
    if name == "CALL_FUNCTION_EX":
        count = 2 + (instruction.arg & 1)
    elif name in _COUNTED:
        count = _COUNTED[name] * instruction.arg + 2 * name.startswith("CALL") + (name == "CALL_KW")
    else:
        count = _OPERANDS.get(name, 0)
    operands = tx.stack[-count:] if count else []
    if not any(_holds_expert(operand, symbols) for operand in operands):
        return False
    if name.startswith("CALL"):
        return not _may_be_called(operands, symbols)
    if name in ("LOAD_ATTR", "LOAD_METHOD"):
        return isinstance(operands[0].realize(), TensorVariable) and instruction.argval in _STATE_OF_TENSORS
    check = {"IS_OP": _is_constant_asked, "COMPARE_OP": _are_numbers, "BINARY_OP": _are_numbers}
    if name in check:
        return not check[name](operands)
    return name != "BINARY_SUBSCR" or not _is_indexing(operands, symbols)


def _holds_expert(value: VariableTracker, symbols: frozenset[Any]) -> bool:
    """Whether `value` is an expert, part or method of one, or computed from its number; or a tuple with one in it."""
    if isinstance(value, LazyVariableTracker):
        if not value.is_realized():
            return bool(roots_of(value.source))
        value = value.unwrap()
    if isinstance(value, SymNodeVariable):
        return not symbols.isdisjoint(free_unbacked_symbols(value.sym_num))
    if type(value) in (TupleVariable, ListVariable, SliceVariable) and value.source is None:
        return any(_holds_expert(item, symbols) for item in value.items)
    if isinstance(value, (GetAttrVariable, UserMethodVariable)):
        return _holds_expert(value.obj, symbols)
    return isinstance(value, (UnspecializedNNModuleVariable, TensorVariable)) and bool(roots_of(value.source))


def _may_be_called(operands: list[VariableTracker], symbols: frozenset[Any]) -> bool:
    """Whether what is called is traced in its turn, or becomes a node of the graph."""
    called = [operand.realize() for operand in operands[:2]]
    function = next((operand for operand in called if type(operand).__name__ != "NullVariable"), None)
    if getattr(function, "is_constant", False):  # torch.compiler.assume_constant_result
        return False
    if isinstance(function, BuiltinVariable):
        return function.fn in _HARMLESS_BUILTINS
    if isinstance(function, GetAttrVariable):
        return isinstance(function.obj.realize(), TensorVariable)
    return isinstance(function, (BaseUserFunctionVariable, UnspecializedNNModuleVariable, BaseTorchVariable))


def _is_constant_asked(operands: list[VariableTracker]) -> bool:
    """`bias is None`. A number may be the very object that another one of its value is."""
    values = [operand.realize() for operand in operands]
    return any(isinstance(value, ConstantVariable) and type(value.value) not in _NUMBERS for value in values)


def _are_numbers(operands: list[VariableTracker]) -> bool:
    """Tensors and numbers: what is done with them is done in the graph, or needs a value."""
    values = [operand.realize() for operand in operands]
    return all(
        isinstance(value, (TensorVariable, SymNodeVariable))
        or (isinstance(value, ConstantVariable) and type(value.value) in _NUMBERS)
        for value in values
    )


def _is_indexing(operands: list[VariableTracker], symbols: frozenset[Any]) -> bool:
    """What `fx_passes.capture.indexing` takes, or an item by a known index of what holds an expert."""
    container, index = operands[0].realize(), operands[1].realize()
    if isinstance(container, TensorVariable) or expert_of_variable(index) is not None:
        return True
    return not _holds_expert(index, symbols)
