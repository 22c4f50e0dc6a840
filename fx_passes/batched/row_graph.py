"""The nodes of a body on one row dim, in a graph of their own.

Every value of the body has a node here, whose example value has the rows in dim 0.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from fx_passes.batched.rows import Labels
from fx_passes.body.values import Op, PerExpert, Shared, Value, map_values
from fx_passes.graph.ops import example, known_tensor, op_name
from fx_passes.region import Rejected

_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack")


class RowGraph:
    """`shapes`, SLOTS or PAIRS, are the dims in which rows may stand, `sizes` the sizes of these dims.

    `steps` are the nodes that brought inputs into shape.
    """

    def __init__(self, shapes: tuple[Labels, ...], sizes: dict[str, int | torch.SymInt]) -> None:
        self.shapes, self.sizes = shapes, sizes
        self.steps: set[fx.Node] = set()
        self._graph = fx.Graph()
        self._leaves: dict[Any, Value] = {}
        self._outer: dict[fx.Node, fx.Node] = {}

    @property
    def leaves(self) -> Iterable[Value]:
        return self._leaves.values()

    def shared(self, source: Any) -> Value:
        return self._leaves.setdefault((Shared, source), Shared(source))

    def leaf(self, kind: type, source: fx.Node, sizes: Iterable[Any], **settings: Any) -> Value:
        """An input of the body, of which one row, or one expert, has `sizes`."""
        key = (kind, source, *settings.values())
        if key not in self._leaves:
            rows = () if kind is PerExpert else (self.sizes["N"],)
            node = self._graph.placeholder(source.name)
            node.meta = _origin(source) | {"example_value": _empty(source, known_tensor(source), (*rows, *sizes))}
            self._leaves[key] = kind(node=node, **settings) if kind is PerExpert else kind(source, node, **settings)
        return self._leaves[key]

    def linear(self, node: fx.Node, rows: Value, weight: PerExpert) -> Value:
        width = weight.shape[1 if weight.transposed else 0]
        return self.op(node, "linear", F.linear, (rows, weight), {}, (width,))

    def op(self, node: fx.Node, name: str, target: Any, args: Any, kwargs: Any, features: tuple[Any, ...]) -> Value:
        """`target` on rows, with the dtype of `node` and rows of the sizes `features`."""
        result = _empty(node, known_tensor(node), (self.sizes["N"], *features))
        return self._op(node, name, target, args, kwargs, result)

    def same_op(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Labels) -> Value:
        """The operation of `node`, whose rows are counted by `labels`."""
        count, result = len(labels), example(node)
        if isinstance(result, (tuple, list)):
            meta: Any = tuple(_empty(node, part, (self.sizes["N"], *part.shape[count:])) for part in result)
        else:
            meta = _empty(node, result, (self.sizes["N"], *result.shape[count:]))
        return self._op(node, op_name(node) or "", node.target, args, kwargs, meta)

    def _op(self, node: fx.Node, name: str, target: Any, args: Any, kwargs: Any, result: Any) -> Value:
        kind = "call_method" if isinstance(target, str) else "call_function"
        own_args, own_kwargs = map_values((args, kwargs), self._own)
        own = self._graph.create_node(kind, target, own_args, own_kwargs, name=node.name)
        own.meta = _origin(node) | {"example_value": result}
        return Op(name, own, args, kwargs, has_rows=True)

    def _own(self, value: Value) -> Any:
        """A node of this graph that stands for `value`."""
        node = value.node
        if not isinstance(node, fx.Node) or node.graph is self._graph:
            return node
        if node not in self._outer:
            self._outer[node] = self._graph.placeholder(node.name)
            self._outer[node].meta = node.meta
        return self._outer[node]


def features_of(value: Value) -> tuple[Any, ...]:
    """The sizes of one row."""
    return tuple(value.node.meta["example_value"].shape[1:])


def _origin(node: fx.Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _ORIGIN if key in node.meta}


def _empty(node: fx.Node, like: torch.Tensor, sizes: tuple[Any, ...]) -> torch.Tensor:
    """A value like one of `node`, of other sizes."""
    mode = getattr(like, "fake_mode", None)
    if mode is None:  # a wrapper of torch.func's around a fake tensor
        raise Rejected("no_function_transform", node, "the experts run under a transform of torch.func")
    with mode:
        return torch.empty(sizes, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad)
