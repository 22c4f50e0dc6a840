"""Rows in a stack of one matrix, as an expert whose number has a dim of its own makes them.

    h = x[tokens] @ up[e]           e [1], up[e] [1, D, F]: [1, R, F]
    y = activation(h) @ down[e]
    out.index_add_(0, tokens, y[0])

The dim of size one is left out of the body: its operations stand for themselves on [R, F], until `y[0]` or the like
takes the dim away. R rows of one expert.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_passes.body.values import Op, PerExpert, Shared, Value, map_values, nested_values, rank
from fx_passes.graph.ops import POINTWISE, example, fake_tensor, normalized_dim

_STACK = "scatter_moe_stack_of_one"
_STACK_RANK = 3


def without_stack(op: Op) -> Value:
    """`op` without the dim of size one that its result or an operand has.

    Where it isn't known how to do without, `op` is what no rule speaks of.
    """
    stacks = [value for value in nested_values((op.args, op.kwargs)) if is_stack(value)]
    if op.name == "matmul" and len(op.args) == 2 and op.has_rows:
        rows, weight = op.args
        if isinstance(weight, PerExpert) and weight.leading == 1 and rank(weight) == _STACK_RANK and rank(rows) == 2:
            return _alone(op, (rows, replace(weight, leading=0)), op.kwargs)
    if not stacks:
        return op
    item = _item(op, *op.args) if op.name == "getitem" and len(op.args) == 2 else None
    if item is not None:
        return item
    if op.name == "chunk" and normalized_dim(op.arg(2, "dim", 0), _STACK_RANK) == _STACK_RANK - 1:
        return _alone(op, op.args[:2], {"dim": -1})
    if op.name in POINTWISE and all(map(_broadcasts, nested_values((op.args, op.kwargs)))):
        return _alone(op, op.args, op.kwargs)
    return replace(op, name=f"{op.name} of a stack of one matrix")


def is_stack(value: Any) -> bool:
    return isinstance(value, Op) and value.node.meta.get(_STACK, False)


def _item(op: Op, stack: Any, index: Any) -> Value | None:
    """`y[0]`, or a piece of `h.chunk(2, -1)`."""
    if not is_stack(stack) or fake_tensor(op.node) is None or type(index) is not int:
        return None
    if stack.name == "chunk":
        return _alone(op, op.args, op.kwargs)
    if index != 0:
        return None
    return replace(stack, node=_node(stack, example(stack.node)))


def _broadcasts(value: Value) -> bool:
    """Whether it stands beside [1, R, F] as it does beside [R, F]."""
    dims = rank(value)
    return is_stack(value) or (dims is not None and dims <= (1 if isinstance(value, Shared) else 2))


def _alone(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
    """`op` on matrices, to be known as a stack."""
    result = example(op.node)
    parts = tuple(map(_first, result)) if isinstance(result, (tuple, list)) else _first(result)
    alone = replace(op, args=args, kwargs=kwargs, has_rows=True)
    node = _node(alone, parts)
    node.meta[_STACK] = True
    return replace(alone, node=node)


def _node(op: Op, value: Any) -> fx.Node:
    """A node in a graph of its own that stands for `op`, with this example value."""
    graph = fx.Graph()
    args, kwargs = map_values((op.args, op.kwargs), lambda operand: _input(graph, operand.node))
    node = graph.create_node(op.node.op, op.node.target, args, kwargs, name=op.node.name)
    node.meta = {**op.node.meta, "example_value": value}
    node.meta.pop(_STACK, None)
    return node


def _input(graph: fx.Graph, source: fx.Node) -> fx.Node:
    node = graph.placeholder(source.name)
    node.meta = source.meta
    return node


def _first(stack: torch.Tensor) -> torch.Tensor:
    """A tensor like the one matrix of `stack`."""
    made = stack.new_empty(stack.shape[1:])
    return made.requires_grad_(stack.requires_grad)
