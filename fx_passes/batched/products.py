"""bmm and matmul: rows times their expert's matrix, or the matrix times rows as columns."""

from dataclasses import replace

from torch import fx

from fx_passes.batched.inputs import padded, resolve
from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Input, Labels, Rows, Seen
from fx_passes.body.values import Gathered, PerExpert, Value
from fx_passes.graph.ops import known_tensor, op_name
from fx_passes.graph.views import View
from fx_passes.region import Rejected


def product(graph: RowGraph, node: fx.Node, left: Seen | None, right: Seen | None) -> Rows:
    """What `node` is, the product of `left` and `right`."""
    for rows, weight, unit in ((left, right, "before"), (right, left, "after")):
        found = _matrix_product(graph, node, rows, weight, unit) if isinstance(weight, Input) else None
        if found is not None:
            return found
    raise Rejected("body_is_row_wise", node, f"`{op_name(node)}` is no product of a row and its expert's weights")


def _matrix_product(graph: RowGraph, node: fx.Node, rows: Seen | None, weight: Input, unit: str) -> Rows | None:
    rank = known_tensor(node).dim()
    matrices = weight.moved(lambda view: _as_matrices(view, rank, unit))
    for labels in (rows.labels,) if isinstance(rows, Rows) else graph.shapes:
        vector = "" if unit == "before" and len(labels) == rank - 1 else unit
        if len(labels) != rank - (2 if vector else 1):
            continue
        value = _row_of(graph, rows, labels, vector, rank)
        parameter = resolve(graph, matrices if vector else matrices.moved(_for_each_row), labels, PerExpert)
        if value is not None and isinstance(parameter, PerExpert):
            return Rows(labels, graph.linear(node, value, parameter), vector)
    return None


def _row_of(graph: RowGraph, rows: Seen | None, labels: Labels, unit: str, rank: int) -> Value | None:
    """One row of `rows`, which stands in a product of `rank` dims with its vector in the place that `unit` says."""
    if isinstance(rows, Rows):
        return rows.value if rows.unit == unit and len(features_of(rows.value)) == 1 else None
    if not isinstance(rows, Input):
        return None
    place = {"after": -1, "before": -2, "": None}[unit]

    def squeezed(view: View) -> View | None:
        dims = list(padded(view.dims, rank))
        if place is not None and dims.pop(place) != ():
            return None
        return replace(view, dims=tuple(dims))

    return resolve(graph, rows.moved(squeezed), labels, Gathered)


def _as_matrices(view: View, rank: int, unit: str) -> View | None:
    """`view` in a product of `rank` dims, each matrix with its outputs first."""
    if len(view.dims) < 2:
        return None
    matrix = view.dims[-2:] if unit == "after" else view.dims[:-3:-1]
    return replace(view, dims=(*padded(view.dims[:-2], rank - 2), *matrix))


def _for_each_row(view: View) -> View:
    """`view`, whose matrices are multiplied with many rows each, which are counted by the dim before the vectors."""
    return replace(view, dims=(*view.dims[:-2], (), *view.dims[-2:]))
