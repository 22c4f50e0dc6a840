"""What Python can see of a trace at one point: live locals, containers and pending side effects.

A loop that is captured as one iteration, or a branch of which only one side is captured, is faithful only if running it
changes nothing that Python sees afterwards. Two snapshots that are equal prove that.
"""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._dynamo.variables.base import ValueMutationExisting, VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.functions import LocalGeneratorObjectVariable
from torch._dynamo.variables.iter import IteratorVariable
from torch._dynamo.variables.lazy import LazyVariableTracker
from torch._dynamo.variables.lists import BaseListVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from fx_passes.capture.liveness import live_locals

Snapshot = dict[str, Any]

_MAX_DEPTH = 8
_ITERATORS = (IteratorVariable, LocalGeneratorObjectVariable)
_NOT_CONTENT = frozenset(("source", "mutation_type", "parents_tracker", "user_code_variable_name"))


def snapshot(tx: Any, at: Any, stack_size: int) -> Snapshot:
    """Everything that code from instruction `at` of `tx` on, or its callers, can read.

    `stack_size` values of the stack count.
    """
    live = live_locals(tx, at)
    state: Snapshot = {
        f"local {name}": _describe(tx.symbolic_locals[name]) for name in live if name in tx.symbolic_locals
    }
    state["grad mode or autocast"] = _modes()
    state["stack"] = tuple(_describe(value) for value in tx.stack[:stack_size])
    caller = tx.parent
    while caller is not None:
        for name, value in caller.symbolic_locals.items():
            state[f"caller {id(caller)} {name}"] = _describe(value)
        caller = caller.parent
    state.update(_side_effects(tx.output.side_effects))
    return state


@dataclass(frozen=True)
class Difference:
    """What changed between two snapshots.

    `carried` are tensors that locals hold (before, after), `names` is everything else.
    """

    carried: tuple[tuple[fx.Node, fx.Node], ...]
    names: tuple[str, ...]


def difference(before: Snapshot, after: Snapshot) -> Difference:
    carried, names = [], []
    for name, value in after.items():
        old = before.get(name)
        if value == old:
            continue
        if _is_node(value) and _is_node(old) and name.startswith("local "):
            carried.append((old[1], value[1]))
        elif not (_is_node(value) and old is None):
            names.append(name.removeprefix("local "))
    return Difference(tuple(carried), tuple(names))


def _is_node(value: Any) -> TypeGuard[tuple[str, fx.Node]]:
    return isinstance(value, tuple) and value[0] == "node"


def _side_effects(side_effects: Any) -> Snapshot:
    state: Snapshot = {}
    for owner, attributes in side_effects.store_attr_mutations.items():
        for name, value in attributes.items():
            state[f"attribute {name} of {type(owner).__name__} {id(owner)}"] = _describe(value)
    for key, value in side_effects.id_to_variable.items():
        mutation = value.mutation_type
        if isinstance(mutation, ValueMutationExisting) and mutation.is_modified:
            state[f"content of {type(value).__name__} {key}"] = _describe_content(value, 0)
    return state


def _modes() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _describe(value: VariableTracker, depth: int = 0) -> Any:
    if isinstance(value, LazyVariableTracker):
        value = value.unwrap()
    if value.source is not None and not isinstance(value, _ITERATORS):
        return ("source", value.source)
    return _describe_content(value, depth)


def _describe_content(value: VariableTracker, depth: int) -> Any:
    if isinstance(value, (TensorVariable, SymNodeVariable)):
        return ("node", value.as_proxy().node) if isinstance(value.proxy, fx.Proxy) else ("id", id(value))
    if isinstance(value, ConstantVariable):
        return ("constant", type(value).__name__, repr(value.as_python_constant()))
    if depth >= _MAX_DEPTH:
        return ("id", id(value))
    if isinstance(value, BaseListVariable):
        return (type(value).__name__, *(_describe(item, depth + 1) for item in value.items))
    if isinstance(value, ConstDictVariable):
        return ("dict", *((hash(key), _describe(item, depth + 1)) for key, item in value.items.items()))
    if isinstance(value, LocalGeneratorObjectVariable):
        return ("generator", id(value), getattr(value.inline_tracer, "instruction_pointer", None))
    if isinstance(value, IteratorVariable):
        fields = {name: vars(value)[name] for name in sorted(vars(value)) if name not in _NOT_CONTENT}
        return (type(value).__name__, *((name, _describe_field(field, depth + 1)) for name, field in fields.items()))
    return ("id", id(value))


def _describe_field(field: Any, depth: int) -> Any:
    """A field of an iterator: how far it has come, or what it runs over."""
    if isinstance(field, VariableTracker):
        return _describe(field, depth)
    if isinstance(field, (list, tuple)):
        return tuple(_describe_field(item, depth) for item in field)
    return field if isinstance(field, (int, str, bool, type(None))) else ("id", id(field))
