"""What Python can see of a trace at one point: live locals, containers and pending side effects.

A loop that is captured as one iteration, or a branch of which only one side is captured, is faithful only if running it
changes nothing that Python sees afterwards. Two snapshots that are equal prove that.
"""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._dynamo.source import NNModuleSource
from torch._dynamo.symbolic_convert import InliningGeneratorInstructionTranslator
from torch._dynamo.variables import SetVariable
from torch._dynamo.variables.base import ValueMutationExisting, VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.functions import LocalGeneratorObjectVariable
from torch._dynamo.variables.iter import IteratorVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable
from torch._guards import Source

from fx_passes.capture.liveness import live_locals

Snapshot = dict[str, Any]
"""By what a user calls it, and behind `_OWN` the number that tells it from others that are called so."""

_OWN = " #"
_KINDS = {
    "CellVariable": "a variable of an enclosing function",
    "NestedUserFunctionVariable": "a function",
    "NewGlobalVariable": "a module",
    "ListVariable": "a list",
    "ConstDictVariable": "a dict",
    "SetVariable": "a set",
}


@dataclass(frozen=True, eq=False)
class _Itself:
    """An object of which nothing is known. It lives on, so that no other has its identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


_MAX_DEPTH = 8
_ITERATORS = (IteratorVariable, LocalGeneratorObjectVariable)
_CONTAINERS = (BaseListVariable, ConstDictVariable, SetVariable)
_NOT_CONTENT = frozenset(
    """
    question source mutation_type parents_tracker user_code_variable_name source_location should_update_in_place
    f_globals
    """.split()
)
"""Nor the globals of a function's module: Dynamo adds names of its own to them, and what code writes is pending."""


def snapshot(tx: Any, at: Any, stack_size: int) -> Snapshot:
    """Everything that code from instruction `at` of `tx` on, or its callers, can read.

    `stack_size` values of the stack count.
    """
    live = live_locals(tx, at)
    state: Snapshot = {
        f"local {name}": _describe(tx.symbolic_locals[name]) for name in live if name in tx.symbolic_locals
    }
    state["grad mode or autocast"] = _modes()
    state.update({f"stack {place}": _describe(value) for place, value in enumerate(tx.stack[:stack_size])})
    state["what is printed"] = len(tx.debug_locals)
    caller = tx.parent
    while caller is not None:
        state["what is printed"] += len(caller.debug_locals)
        for name, value in caller.symbolic_locals.items():
            state[f"a caller's local {name}{_OWN}{id(caller)}"] = _describe(value)
        caller = caller.parent
    state["random numbers"] = len(tx.output.random_calls)
    state.update(_side_effects(tx.output.side_effects))
    return state


def shows_all(tx: Any) -> bool:
    """Whether snapshots in `tx` show all that may change.

    What a generator yields goes to whoever asks for it: another function than the one that called it, or `sum`.
    """
    while tx is not None:
        if isinstance(tx, InliningGeneratorInstructionTranslator):
            return False
        tx = tx.parent
    return True


@dataclass(frozen=True)
class Difference:
    """What changed between two snapshots.

    `carried` are tensors that live locals hold: the name, before (None where it was not bound) and after. `names` is
    everything else.
    """

    carried: tuple[tuple[str, fx.Node | None, fx.Node], ...]
    names: tuple[str, ...]


def difference(before: Snapshot, after: Snapshot) -> Difference:
    carried, names = [], []
    for name, value in after.items():
        old = before.get(name)
        if value == old:
            continue
        if name.startswith("local ") and _is_node(value) and (old is None or _is_node(old)):
            carried.append((name, old[1] if old is not None else None, value[1]))
        else:
            names.append(name)
    return Difference(tuple(carried), tuple(names))


def _is_node(value: Any) -> TypeGuard[tuple[str, fx.Node]]:
    return isinstance(value, tuple) and value[0] == "node"


def _side_effects(side_effects: Any) -> Snapshot:
    """Pending writes: attributes, cells and globals; the content of containers and of objects that hold one."""
    state: Snapshot = {"hooks on tensors": tuple(side_effects.tensor_hooks)}
    for owner, attributes in list(side_effects.store_attr_mutations.items()):
        for name, value in list(attributes.items()):
            is_private = name == "cell_contents" or name.startswith("__")
            said = _kind(owner) if is_private else f"attribute {name} of {_kind(owner)}"
            state[f"{said}{_OWN}{id(owner)} {name}"] = _describe(value)
    for key, value in list(side_effects.id_to_variable.items()):
        mutation = value.mutation_type
        name = f"the content of {_kind(value)}{_OWN}{key}"
        if isinstance(mutation, ValueMutationExisting) and mutation.is_modified:
            state[name] = _describe_content(value, 0)
        elif isinstance(value, UserDefinedObjectVariable):
            held = [
                field for field in vars(value).values() if isinstance(field, _CONTAINERS) and _may_be_written(field)
            ]
            if held:
                state[name] = tuple(_describe_content(field, 0) for field in held)
    return state


def _kind(variable: VariableTracker) -> str:
    """What a user calls an object that Dynamo has as `variable`."""
    if isinstance(variable, UserDefinedObjectVariable):
        return f"a {type(variable.value).__name__}"
    return _KINDS.get(type(variable).__name__, "an object")


def said_of(name: str) -> str:
    """What the user is told of an entry of a snapshot."""
    return "a value in use" if name.startswith("stack ") else name.partition(_OWN)[0].removeprefix("local ")


def _may_be_written(container: Any) -> bool:
    """Whether the dict, list or set inside an object (a Counter, say) was written, as far as can be told."""
    if isinstance(container.mutation_type, ValueMutationExisting) and container.mutation_type.is_modified:
        return True
    original = getattr(container, "original_items", None)
    return original is None or _describe_field(original, 0) != _describe_field(container.items, 0)


def _modes() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _describe(value: VariableTracker, depth: int = 0) -> Any:
    if isinstance(value, LazyVariableTracker):
        if not value.is_realized():
            return ("source", _place(value.source))
        value = value.unwrap()
    if value.source is not None and not isinstance(value, _ITERATORS):
        return ("source", _place(value.source))
    return _describe_content(value, depth)


def _place(source: Source | None) -> Source | None:
    """`source` without what Dynamo adds when it looks at what is there and sees that it is a module."""
    return source.base if isinstance(source, NNModuleSource) else source


def _describe_content(value: VariableTracker, depth: int) -> Any:
    """What tells `value` apart: the node of a tensor, a constant, and of anything else its type and all its fields."""
    if isinstance(value, (TensorVariable, SymNodeVariable)):
        return ("node", value.as_proxy().node) if isinstance(value.proxy, fx.Proxy) else ("itself", _Itself(value))
    if isinstance(value, ConstantVariable):
        return ("constant", type(value).__name__, repr(value.as_python_constant()))
    if isinstance(value, LocalGeneratorObjectVariable):
        return ("generator", _Itself(value), _describe_frame(value.inline_tracer, depth))
    if depth >= _MAX_DEPTH:
        return ("unseen", object())
    fields = sorted(name for name in vars(value) if name not in _NOT_CONTENT)
    return (type(value).__name__, *((name, _describe_field(vars(value)[name], depth + 1)) for name in fields))


def _describe_frame(tx: Any, depth: int) -> Any:
    """How far a generator has come, and with what: its locals and its stack."""
    values = (dict(getattr(tx, "symbolic_locals", {})), list(getattr(tx, "stack", ())))
    return (getattr(tx, "instruction_pointer", None), *(_describe_field(value, depth + 1) for value in values))


def _describe_field(field: Any, depth: int) -> Any:
    """A field of a variable: items, an inner container, how far an iterator has come."""
    if isinstance(field, VariableTracker):
        return _describe(field, depth)
    if isinstance(field, dict):
        return tuple((_describe_key(key, depth), _describe_field(item, depth)) for key, item in list(field.items()))
    if isinstance(field, (list, tuple)):
        return tuple(_describe_field(item, depth) for item in field)
    if isinstance(field, (set, frozenset)):
        return frozenset(_describe_key(item, depth) for item in field)
    return field if isinstance(field, (int, str, bool, type(None))) else _Itself(field)


def _describe_key(key: Any, depth: int) -> Any:
    """A key of a dict or an item of a set, which Dynamo wraps. Its hash may be that of another: -1 and -2 have one."""
    return _describe_field(getattr(key, "vt", key), depth)
