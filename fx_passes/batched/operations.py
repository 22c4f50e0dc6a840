"""Operations on rows, each row alone: pointwise, along a dim of the row, norms."""

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fx_passes.batched.inputs import lined_up, repeats_tokens, resolve
from fx_passes.batched.moves import refused
from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Input, Labels, Rows, Seen
from fx_passes.body.values import Gathered, PerExpert, SlotGathered, Value
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, normalized_dim
from fx_passes.region import Rejected
from fx_passes.rules.row_wise import NORMS, POINTWISE

ALONG_DIM = {"chunk": 2, "split": 2, "softmax": 1}
"""The place of the argument `dim`."""


def operation(graph: RowGraph, node: fx.Node, name: str, seen: Callable[[fx.Node], Seen | None]) -> Rows:
    """What `node` is, the operation `name` on nodes that are what `seen` says."""
    operands = [seen(operand) for operand in node.all_input_nodes]
    if any(isinstance(operand, Rows) and operand.unit for operand in operands):
        return _beside_unit(graph, node, name, operands, seen)
    labels = _labels(graph, operands)
    if labels is None:
        raise refused(node)
    rank = known_tensor(node).dim() if fake_tensor(node) is not None else 0

    def beside(operand: fx.Node) -> Value:
        return beside_rows(graph, operand, seen(operand), labels, rank)

    if name == "type_as":
        rows = beside(node.args[0])
        return Rows(labels, graph.op(node, "to", "to", (rows, known_tensor(node).dtype), {}, features_of(rows)))
    if name in ALONG_DIM:
        return Rows(labels, _along_dim(graph, node, ALONG_DIM[name], labels, seen))
    if name in POINTWISE or (name in NORMS and len(arg(node, 1, "normalized_shape")) == rank - len(labels)):
        args, kwargs = map_arg((node.args, dict(node.kwargs)), beside)
        return Rows(labels, graph.same_op(node, args, kwargs, labels))
    raise refused(node)


def beside_rows(graph: RowGraph, node: Any, seen: Seen | None, labels: Labels, rank: int) -> Value:
    """A tensor beside rows, lined up with them in `rank` dims."""
    if isinstance(seen, Rows):
        if seen.labels != labels:
            raise refused(node)
        return seen.value
    if fake_tensor(node) is None or (isinstance(seen, Input) and known_tensor(node).dim() <= rank - len(labels)):
        return graph.shared(node)
    value = None
    if isinstance(seen, Input):
        value = resolve(graph, lined_up(seen, rank), labels, Gathered, SlotGathered, PerExpert)
    if value is None:
        raise Rejected("body_is_row_wise", node, "a tensor stands beside rows that is not known to belong to them")
    return value


def _labels(graph: RowGraph, operands: list[Seen | None]) -> Labels | None:
    """How the rows of an operation are counted; tokens that are repeated in front of all experts are rows of pairs."""
    labels = next((operand.labels for operand in operands if isinstance(operand, Rows)), None)
    return labels or (("M",) if ("M",) in graph.shapes and any(map(repeats_tokens, operands)) else None)


def _beside_unit(
    graph: RowGraph, node: fx.Node, name: str, operands: list[Seen | None], seen: Callable[[fx.Node], Seen | None]
) -> Rows:
    """A pointwise operation on rows that all keep a dim of size one in the same place."""
    rows = [operand for operand in operands if isinstance(operand, Rows)]
    alike = {(row.labels, row.unit, len(features_of(row.value))) for row in rows}
    if name not in POINTWISE or len(rows) != len(operands) or len(alike) != 1:
        raise refused(node)
    labels, unit, _ = alike.pop()
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda row: beside_rows(graph, row, seen(row), labels, 0))
    return Rows(labels, graph.op(node, name, node.target, args, kwargs, features_of(rows[0].value)), unit)


def _along_dim(
    graph: RowGraph, node: fx.Node, place: int, labels: Labels, seen: Callable[[fx.Node], Seen | None]
) -> Value:
    rank, dim = known_tensor(node.args[0]).dim(), arg(node, place, "dim")
    own = normalized_dim(dim, rank) - len(labels) if isinstance(dim, int) else -1
    if own < 0:
        raise refused(node)
    rows = beside_rows(graph, node.args[0], seen(node.args[0]), labels, rank)
    kwargs = {key: value for key, value in node.kwargs.items() if key != "dim"} | {"dim": own + 1}
    return graph.same_op(node, (rows, *node.args[1:place]), kwargs, labels)
