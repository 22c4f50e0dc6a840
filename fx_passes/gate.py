"""What a Python method between an expert's two matrix products computes, found by running it once on a stand-in.

    def _apply_gate(self, h): gate, up = h.chunk(2, dim=-1); return self.act_fn(gate) * up    ->    silu, concatenated

`inputs_of(module, method)` reads what the method can read from its module. It is plain Python, so Dynamo traces it and
guards all that it reads. `recognise` depends on that alone: the method runs on an object of the same class that has
these attributes and no others, and the operations that it calls are matched as an expert's body is. A method that
reads, writes or computes anything else is not recognised.
"""

import functools
import logging
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fx_passes.body import Gathered, Op, PerExpert, Value
from fx_passes.mlp_body import match_activation
from fx_passes.ops import op_name

_log = logging.getLogger("scatter_moe")
_READABLE = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType, functools.partial)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ROWS = 3


class Gate(NamedTuple):
    """An activation as the operator `mlp` takes it."""

    activation: str
    layout: str
    alpha: float = 1.702
    limit: float = 7.0


class Unreadable:
    """Stands for what a method reads but no rule speaks of: a tensor, a list, a configuration."""


# What a function `f(self, ...)` reads: f, the class of self, and (name, value) of its attributes, where a value is
# plain, a function, or again such a triple for a submodule. Plain tuples, since Dynamo passes these as constants.
Inputs = tuple[Any, type, tuple[tuple[str, Any], ...]]


def inputs_of(module: nn.Module, name: str) -> Inputs | type[Unreadable]:
    """Of the method `name`; `Unreadable` where it isn't the one of module's class."""
    bound = getattr(module, name)
    if not isinstance(bound, MethodType) or bound.__func__ is not getattr(type(module), name):
        return Unreadable
    return inputs_of_function(module, bound.__func__)


def inputs_of_function(module: nn.Module, function: Any) -> Inputs:
    """Of a function that is called with the module as its first argument."""
    names = [name for name in names_read(function) if hasattr(module, name)]
    return function, type(module), tuple([(name, _read(module, name)) for name in names])


def _read(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if isinstance(value, nn.Module):
        has_hooks = any(len(getattr(value, hooks)) for hooks in _HOOKS)
        return Unreadable if has_hooks else inputs_of(value, "forward")
    if isinstance(value, float):
        return slice(value)  # Dynamo turns the attribute into a symbol once it has changed, but not within a slice
    return value if isinstance(value, _READABLE) else Unreadable


@torch.compiler.assume_constant_result
def names_read(function: Any) -> tuple[str, ...]:
    """All names in the code that may be attributes of its first argument, a module."""
    return _names_read(function)


@torch.compiler.assume_constant_result
def recognise(inputs: Any, width: int, dtype: torch.dtype) -> Gate | None:
    """The activation that the function is on rows `[N, width]`, or None."""
    return _recognise(_plain(inputs), width, dtype)


def _plain(value: Any) -> Any:
    """Inputs with the floats themselves in the place of their slices."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.stop if isinstance(value, slice) else value


@functools.lru_cache(maxsize=256)
def _names_read(function: Any) -> tuple[str, ...]:
    code = getattr(function, "__code__", None)
    names = _names_in(code) if code is not None else ()
    return tuple(dict.fromkeys(name for name in names if not hasattr(nn.Module, name)))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


@functools.lru_cache(maxsize=256)
def _recognise(inputs: Any, width: int, dtype: torch.dtype) -> Gate | None:
    if not _is_readable(inputs):
        return None
    function, *_ = inputs
    recorder, module = _Recorder(width, dtype), _stand_in(inputs)
    before = dict(vars(module))
    try:
        with recorder:
            out = function(module, recorder.h)
    except Exception as error:  # noqa: BLE001  any class's code runs here, on what it wasn't written for
        _log.debug("%s is not recognised: %s", function.__qualname__, error)
        return None
    matched = match_activation(recorder.value_of(out))
    if matched is None or recorder.wrote or vars(module) != before:
        return None
    activation, layout, _, _, numbers = matched
    return Gate(activation, layout, **numbers)


def _is_readable(value: Any) -> bool:
    if isinstance(value, tuple):
        _, _, attributes = value
        return all(_is_readable(attribute) for _, attribute in attributes)
    return value is not Unreadable


def _stand_in(inputs: Inputs) -> nn.Module:
    """A module of the same class that has nothing but the attributes of `inputs`."""
    _, owner, attributes = inputs
    module = object.__new__(owner)
    nn.Module.__init__(module)
    for name, value in attributes:
        vars(module)[name] = _stand_in(value) if isinstance(value, tuple) else value
    return module


class _Recorder(TorchFunctionMode):
    """Notes which operation on `h = x W^T` each tensor is the result of. Tensors have shapes and no data."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []
        x = self._node("x", torch.empty(_ROWS, 1, device="meta", dtype=dtype))
        weight = self._node("weight", torch.empty(width, 1, device="meta", dtype=dtype))
        self.h = torch.empty(_ROWS, width, device="meta", dtype=dtype)
        rows, parameter = Gathered(x, x), PerExpert(weight, stacked=weight)
        self._note(self.h, Op("linear", self._node("h", self.h), (rows, parameter), {}, has_rows=True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and id(out) in self._values:
            return out  # a cast to its own dtype, say
        if isinstance(out, Tensor) or _is_tuple_of_tensors(out):
            self._record(func, args, kwargs, out)
        return out

    @property
    def wrote(self) -> bool:
        """Whether anything was changed in place."""
        return any(tensor._version for tensor in self._alive)

    def value_of(self, tensor: Any) -> Any:
        return self._values.get(id(tensor))

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        node = self._graph.call_function(func)
        if op_name(node) is None and getattr(Tensor, func.__name__, None) is func:
            node = self._graph.call_method(func.__name__)
        node.meta["example_value"] = out
        op = Op(op_name(node) or "", node, self._values_in(args), self._values_in(kwargs), has_rows=True)
        if isinstance(out, Tensor):
            self._note(out, op)
            return
        for i, part in enumerate(out):
            self._note(part, Op("getitem", self._node(f"part_{i}", part), (op, i), {}, has_rows=True))

    def _values_in(self, arguments: Any) -> Any:
        if isinstance(arguments, Tensor):
            return self._values[id(arguments)]
        if isinstance(arguments, dict):
            return {name: self._values_in(value) for name, value in arguments.items()}
        if type(arguments) in (tuple, list):
            return type(arguments)(self._values_in(value) for value in arguments)
        return arguments

    def _node(self, name: str, example: Tensor) -> fx.Node:
        node = self._graph.placeholder(name)
        node.meta["example_value"] = example
        return node

    def _note(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)  # so that no other tensor gets its id


def _is_tuple_of_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(item, Tensor) for item in value)
