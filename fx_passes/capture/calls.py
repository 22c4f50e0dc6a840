"""Calls whose result Dynamo does not know, or knows less of than we do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

from fx_passes.capture import bounds, counts, expert_numbers, index_list, leaves, loops, modules_to, segments
from fx_passes.capture.variables import expert_of_variable, has_open_length, is_open, rank_of, read_attribute
from fx_passes.facts import fact
from fx_passes.graph.ops import known_tensor, op_name

_ZEROS = (torch.zeros, torch.zeros_like)
_TO_LISTS = (set, sorted, list)
_CATS = (torch.cat, torch.concat, torch.concatenate)


def call(
    capture: Any, tx: Any, fn: VariableTracker, args: list[VariableTracker], kwargs: dict[str, VariableTracker]
) -> VariableTracker | None:
    """The result of `fn(*args, **kwargs)`, or None where it is Dynamo's to find."""
    called = _python_callable(fn)
    if called is torch.split and args:
        return _method("split", capture, tx, args[0], args[1:], kwargs)
    if called in _CATS:
        return segments.cat(capture, tx, args, kwargs)
    if called is int:
        return _integer(capture, tx, args, kwargs)
    if called is sum:
        return segments.total(capture, tx, args, kwargs)
    if called in _TO_LISTS:
        return index_list.convert(tx, called, args, kwargs)
    if called is enumerate and len(args) == 1:
        return _enumerate(capture, tx, fn, args[0], kwargs)
    if called in _ZEROS:
        return leaves.zeros(capture, tx, fn, args, kwargs)
    if called is nn.Module.to:
        return modules_to.to(capture, tx, fn, args, kwargs)
    name, owner = getattr(fn, "name", None), getattr(fn, "obj", None)
    if isinstance(name, str) and isinstance(owner, VariableTracker):
        return _method(name, capture, tx, owner, args, kwargs)
    return None


def _method(name: str, capture: Any, tx: Any, owner: VariableTracker, args: Any, kwargs: Any) -> VariableTracker | None:
    """The result of `owner.name(*args, **kwargs)` for a tensor."""
    if name not in _METHODS:
        return None
    tensor = owner.realize()
    if not isinstance(tensor, TensorVariable) or not isinstance(tensor.proxy, fx.Proxy):
        return None
    return _METHODS[name](capture, tx, tensor, args, kwargs)


def _enumerate(capture: Any, tx: Any, fn: Any, listed: VariableTracker, kwargs: Any) -> VariableTracker | None:
    """`for e, n in enumerate(counts.numpy()):`, `for i, e in enumerate(hit):`"""
    header = _header_of_loop_over_result(tx)
    if header is None or kwargs:
        return None
    numbers = counts.iterate(capture, tx, listed, header)
    return fn.call_function(tx, [numbers], {}) if numbers is not None else loops.enumerated(capture, tx, listed, header)


def _header_of_loop_over_result(tx: Any) -> Any | None:
    """The header of the loop that runs over what is called now."""
    following = tx.instructions[tx.instruction_pointer :][:2]
    opnames = [instruction.opname for instruction in following]
    return following[1] if opnames == ["GET_ITER", "FOR_ITER"] else None


def _python_callable(fn: VariableTracker) -> Any:
    """The function that a variable stands for; None where that is not known without a look at it."""
    called = getattr(fn, "value", None) or getattr(fn, "fn", None)
    return called if callable(called) else None


def _tolist(capture: Any, tx: Any, tensor: TensorVariable, args: Any, kwargs: Any) -> VariableTracker | None:
    if args or kwargs:
        return None
    header = _header_of_loop_over_result(tx)
    numbers = loops.iterate(capture, tx, tensor, header) if header is not None else None
    found = numbers or index_list.read(capture, tx, tensor) or counts.read(capture, tx, tensor)
    if found is None and has_open_length(tensor) and fact(tensor.as_proxy().node) is None:
        detail = "numbers are listed that are not known to be those of the experts with a token"
        capture.reject(tx, "loop_is_over_the_hit_experts", detail)
    if found is None and rank_of(tensor) > 1:
        expert_numbers.reject_single(capture, tx, tensor.as_proxy().node)
    return found


def _integer(capture: Any, tx: Any, args: Any, kwargs: Any) -> VariableTracker | None:
    if len(args) != 1 or kwargs:
        return None
    value = args[0].realize()
    found = expert_numbers.number(capture, value) or bounds.item(capture, tx, value)
    if found is None and isinstance(value, TensorVariable) and expert_of_variable(value) is None:
        counts.reject_other_numbers(capture, tx, value.as_proxy().node)
        expert_numbers.reject_single(capture, tx, value.as_proxy().node)
    return found


def _item(capture: Any, tx: Any, tensor: TensorVariable, args: Any, kwargs: Any) -> VariableTracker | None:
    found = _integer(capture, tx, [tensor], {}) if not args and not kwargs else None
    if found is None and op_name(tensor.as_proxy().node) == "searchsorted":
        detail = "rows are cut where a search among sorted ids says, which is not known to be where an expert's begin"
        capture.reject(tx, "segments_are_those_of_an_expert", detail)
    return found


def _new_tensor(capture: Any, tx: Any, tensor: TensorVariable, args: Any, kwargs: Any) -> VariableTracker | None:
    """`x.new_tensor([len(tokens), ...])` as `torch.tensor`, which takes such numbers in PyTorch before 2.13, too."""
    if len(args) != 1 or not kwargs.keys() <= {"dtype", "device"} or not _holds_open_numbers(args[0]):
        return None
    given = {name: read_attribute(tx, tensor, name) for name in ("dtype", "device")} | kwargs
    return TorchInGraphFunctionVariable(torch.tensor).call_function(tx, args, given)


def _to(capture: Any, tx: Any, tensor: TensorVariable, args: Any, kwargs: Any) -> VariableTracker | None:
    """`out = out.to(y.dtype)` in a loop over experts, where that is its dtype: the tensor itself, as in eager."""
    if not capture.scopes or len(args) != 1 or kwargs or not args[0].is_python_constant():
        return None
    dtype = args[0].as_python_constant()
    return tensor if isinstance(dtype, torch.dtype) and dtype == known_tensor(tensor.as_proxy().node).dtype else None


def _holds_open_numbers(variable: VariableTracker) -> bool:
    """Whether a list has a number that depends on data."""
    variable = variable.realize()
    if not isinstance(variable, (ListVariable, TupleVariable)):
        return False
    items = [item.realize() for item in variable.items]
    return any(isinstance(item, SymNodeVariable) and is_open(item.sym_num) for item in items)


_METHODS: dict[str, Callable[..., VariableTracker | None]] = {
    "tolist": _tolist,
    "cumsum": counts.cumsum,
    "split": segments.split,
    "item": _item,
    "new_tensor": _new_tensor,
    "to": _to,
}
