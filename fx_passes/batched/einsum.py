"""einsum: rows times their expert's matrix, and the weighted sum over the experts of each token."""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_passes.batched.inputs import resolve
from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Input, Labels, Rows, Seen, Total, are_tokens
from fx_passes.body.values import Gathered, PerExpert, SlotGathered, Value
from fx_passes.graph.views import View
from fx_passes.region import Rejected

Operand = tuple[str, Seen | None]
"""The letters of an operand, and what it is."""


def equation_of(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """The equation of an einsum of two operands, and the operands."""
    equation = node.args[0]
    operands = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        raise Rejected("body_is_row_wise", node, "an einsum of other than two operands")
    equation = equation.replace(" ", "")
    if any(len(set(letters)) != len(letters) for letters in equation.split("->")[0].split(",")):
        raise Rejected("body_is_row_wise", node, f"einsum `{equation}` takes a diagonal")
    return equation, tuple(operands)


def einsum(graph: RowGraph, node: fx.Node, equation: str, left: Seen | None, right: Seen | None) -> Seen:
    """What `node` is, the einsum of `left` and `right`."""
    inputs, out = equation.split("->")
    operands = list(zip(inputs.split(","), (left, right), strict=True))
    for rows, weight in (operands, operands[::-1]):
        found = _linear(graph, node, rows, weight, out) or _total(graph, node, rows, weight, out)
        if found is not None:
            return found
    raise Rejected("body_is_row_wise", node, f"einsum `{equation}` is no product of a row and its expert's weights")


def _linear(graph: RowGraph, node: fx.Node, rows: Operand, weight: Operand, out: str) -> Rows | None:
    """`einsum("td,tkfd->tkf", x, up)`."""
    row_letters, (letters, matrix) = rows[0], weight
    contracted = [c for c in row_letters if c in letters and c not in out]
    counted, width = out[:-1], out[-1:]
    if not isinstance(matrix, Input) or len(contracted) != 1 or width not in letters or width in row_letters:
        return None
    if set(letters + row_letters) - set(out + contracted[0]):
        return None
    columns = matrix.moved(lambda view: _reordered(view, letters, counted, width + contracted[0]))
    for labels in _labels(graph, rows, counted):
        parameter = resolve(graph, columns, labels, PerExpert)
        value = _row_of(graph, rows, counted, contracted[0], labels)
        if value is not None and isinstance(parameter, PerExpert):
            return Rows(labels, graph.linear(node, value, parameter))
    return None


def _labels(graph: RowGraph, rows: Operand, counted: str) -> tuple[Labels, ...]:
    """What the letters `counted` may stand for."""
    letters, row = rows
    if not isinstance(row, Rows):
        return tuple(labels for labels in graph.shapes if len(labels) == len(counted))
    names = dict(zip(letters, row.labels, strict=False))
    return (tuple(names[c] for c in counted),) if set(counted) == set(names) else ()


def _row_of(graph: RowGraph, rows: Operand, counted: str, vector: str, labels: Labels) -> Value | None:
    letters, row = rows
    if isinstance(row, Rows):
        is_vector = len(letters) == len(row.labels) + 1 and letters[-1] == vector
        return row.value if not row.unit and is_vector else None
    if not isinstance(row, Input):
        return None
    return resolve(graph, row.moved(lambda view: _reordered(view, letters, counted, vector)), labels, Gathered)


def _total(graph: RowGraph, node: fx.Node, rows: Operand, weights: Operand, out: str) -> Total | None:
    """`einsum("tkd,tk->td", y, weights)`."""
    (row_letters, row), (letters, table) = rows, weights
    if not isinstance(row, Rows) or row.unit or not isinstance(table, Input) or len(features_of(row.value)) != 1:
        return None
    names = dict(zip(row_letters, row.labels, strict=False))
    tokens = tuple(names.get(letter, "") for letter in out[:-1])
    if not are_tokens(tokens) or out[-1] != row_letters[-1] or set(letters) != set(names):
        return None
    columns = table.moved(lambda view: _reordered(view, letters, "".join(names), " "))
    value = resolve(graph, columns, row.labels, SlotGathered)
    if value is None:
        return None
    weighted = graph.op(node, "mul", torch.mul, (row.value, value), {}, features_of(row.value))
    return Total(weighted, token_dims=len(tokens))


def _reordered(view: View, letters: str, counted: str, rest: str) -> View:
    """`view` with its dims in the order of `counted` and `rest`; a letter that it lacks is a dim of size one."""
    dims = dict(zip(letters, view.dims, strict=True))
    return replace(view, dims=tuple(dims.get(letter, ()) for letter in counted + rest))
