"""Runs Python code on tensors that have shapes and no data, and notes which operation each tensor is the result of.

What it gives are the values that a captured expert's body is made of (`fx_passes.body.values`), so that code which is
called outside of any graph is matched by the same rules.
"""

from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fx_passes.body.values import Op, Value
from fx_passes.graph.ops import by_position, op_name


class Recorder(TorchFunctionMode):
    """Notes operations that are called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._graph = fx.Graph()
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []

    def node(self, name: str, like: Tensor) -> fx.Node:
        """An input of the graph, with `like` as what is known of it."""
        node = self._graph.placeholder(name)
        node.meta["example_value"] = like
        return node

    def note(self, tensor: Tensor, value: Value) -> None:
        """From now on, `tensor` is `value`."""
        self._values[id(tensor)] = value
        self._alive.append(tensor)  # so that no other tensor gets its id

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
        name = op_name(node) or ""
        args, kwargs = by_position(name, self._values_in(args), self._values_in(kwargs))
        op = Op(name, node, args, kwargs, has_rows=True)
        if isinstance(out, Tensor):
            self.note(out, op)
            return
        for i, part in enumerate(out):
            self.note(part, Op("getitem", self.node(f"part_{i}", part), (op, i), {}, has_rows=True))

    def _values_in(self, arguments: Any) -> Any:
        if isinstance(arguments, Tensor):
            return self._values[id(arguments)]
        if isinstance(arguments, dict):
            return {name: self._values_in(value) for name, value in arguments.items()}
        if type(arguments) in (tuple, list):
            return type(arguments)(self._values_in(value) for value in arguments)
        return arguments


def _is_tuple_of_tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(item, Tensor) for item in value)
