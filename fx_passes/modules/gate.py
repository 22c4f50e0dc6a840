"""What a Python method between an expert's two matrix products computes, found by running it once on a stand-in.

    def _apply_gate(self, h): gate, up = h.chunk(2, dim=-1); return self.act_fn(gate) * up    ->    silu, concatenated

`inputs_of(module, method)` reads what the method can read from its module. It is plain Python, so Dynamo traces it and
guards all that it reads. `recognise` depends on that alone: the method runs on an object of the same class that has
these attributes and no others, and the operations that it calls are matched as an expert's body is. A method that
reads, writes or computes anything else is not recognised, nor is one that reads data of its Python module or closure.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_passes.body.activation_body import match_activation
from fx_passes.body.values import Gathered, Op, PerExpert
from fx_passes.entry.hook_guards import HOOKS
from fx_passes.modules.recorder import Recorder

_log = logging.getLogger("scatter_moe")
_READABLE = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType, functools.partial)
_DATA = (bool, int, float, str, type(None), list, dict, set, Tensor)
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


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return any(len(getattr(module, hooks)) for hooks in HOOKS)


def _read(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if isinstance(value, nn.Module):
        return Unreadable if has_hooks(value) else inputs_of(value, "forward")
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
    module, recorder = _stand_in(inputs), Recorder()
    before = dict(vars(module))
    try:
        h = _product(recorder, width, dtype)
        with recorder:
            out = function(module, h)
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
        function, _, attributes = value
        return not _reads_data(function, set()) and all(_is_readable(attribute) for _, attribute in attributes)
    return value is not Unreadable and not _reads_data(value, set())


def _reads_data(function: Any, seen: set[Any]) -> bool:
    """Whether a Python function, or one that it calls, reads variables of its module, of another or of its closure.

    Nobody would notice if they changed. PyTorch's own functions do as they are told.
    """
    function = function.func if isinstance(function, functools.partial) else function
    if not isinstance(function, FunctionType) or function in seen or function.__module__.startswith("torch."):
        return False
    seen.add(function)
    outer = inspect.getclosurevars(function)
    read = [*outer.globals.values(), *outer.nonlocals.values()]
    names = tuple(_names_in(function.__code__))
    read += [
        vars(module)[name]
        for module in read
        if isinstance(module, ModuleType)
        for name in names
        if name in vars(module)
    ]
    return any(isinstance(value, _DATA) or _reads_data(value, seen) for value in read)


def _product(recorder: Recorder, width: int, dtype: torch.dtype) -> Tensor:
    """h = x W^T, which the function is called with."""
    x, weight, h = (
        torch.empty(shape, device="meta", dtype=dtype) for shape in ((_ROWS, 1), (width, 1), (_ROWS, width))
    )
    x_node, weight_node = recorder.node("x", x), recorder.node("weight", weight)
    arguments = Gathered(x_node, x_node), PerExpert(weight_node, stacked=weight_node)
    recorder.note(h, Op("linear", recorder.node("h", h), arguments, {}, has_rows=True))
    return h


def _stand_in(inputs: Inputs) -> nn.Module:
    """A module of the same class that has nothing but the attributes of `inputs`."""
    _, owner, attributes = inputs
    module = object.__new__(owner)
    nn.Module.__init__(module)
    for name, value in attributes:
        vars(module)[name] = _stand_in(value) if isinstance(value, tuple) else value
    return module
