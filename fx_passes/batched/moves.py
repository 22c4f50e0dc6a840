"""Rows in other dims, each as it was; or each row in another shape; or a part of each row."""

import torch
from torch import fx

from fx_passes.batched.row_graph import RowGraph, features_of
from fx_passes.batched.rows import Labels, Rows, in_parts
from fx_passes.body.values import Op
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, normalized_dim, op_name, same_size, same_sizes, varargs
from fx_passes.region import Rejected

MOVES = frozenset("view reshape flatten unflatten squeeze unsqueeze permute transpose swapaxes getitem".split())


def moved(graph: RowGraph, node: fx.Node, rows: Rows) -> Rows:
    """What `node` is, one of MOVES of `rows`."""
    name = op_name(node)
    if name == "getitem":
        return _indexed(graph, node, rows)
    if name in ("permute", "transpose", "swapaxes"):
        return _permuted(node, rows)
    if name in ("unsqueeze", "squeeze"):
        return _unit(node, rows)
    return _reshaped(graph, node, rows)


def refused(node: fx.Node) -> Rejected:
    return Rejected("body_is_row_wise", node, f"`{op_name(node)}` is not known to keep rows apart")


def _reshaped(graph: RowGraph, node: fx.Node, rows: Rows) -> Rows:
    if rows.unit:
        raise refused(node)
    after, features = known_tensor(node).shape, features_of(rows.value)
    regrouped = [labels for labels in (rows.labels, *graph.shapes) if _counts_rows(graph, labels, after, rows)]
    for labels in regrouped:
        if same_sizes(after[len(labels) :], features):
            return Rows(labels, rows.value)
    for labels in regrouped:
        own = tuple(after[len(labels) :])
        return Rows(labels, graph.op(node, "reshape", "reshape", (rows.value, -1, *own), {}, own))
    raise refused(node)


def _counts_rows(graph: RowGraph, labels: Labels, shape: torch.Size, rows: Rows) -> bool:
    """Whether the first dims of `shape` count `rows` as `labels` say, in the same row-major order."""
    sizes = [graph.sizes[label] for label in labels]
    same = len(shape) > len(labels) and all(map(same_size, shape, sizes))
    return same and in_parts(labels) == in_parts(rows.labels)


def _permuted(node: fx.Node, rows: Rows) -> Rows:
    rank = known_tensor(node).dim()
    dims = [normalized_dim(dim, rank) for dim in varargs(node, 1, "dims")]
    if op_name(node) != "permute":
        order = list(range(rank))
        order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        dims = order
    count = len(rows.labels)
    if rows.unit or dims[count:] != list(range(count, rank)):
        raise refused(node)
    return Rows(tuple(rows.labels[dim] for dim in dims[:count]), rows.value)


def _unit(node: fx.Node, rows: Rows) -> Rows:
    """A dim of size one beside the vector of a row comes or goes."""
    dim, before, after = arg(node, 1, "dim"), known_tensor(node.args[0]).dim(), known_tensor(node).dim()
    count, adds = len(rows.labels), op_name(node) == "unsqueeze"
    place = normalized_dim(dim, max(before, after)) if isinstance(dim, int) else -1
    unit = {count: "before", count + 1: "after"}.get(place, "")
    if len(features_of(rows.value)) != 1 or not unit or rows.unit != ("" if adds else unit):
        raise refused(node)
    return Rows(rows.labels, rows.value, unit if adds else "")


def _indexed(graph: RowGraph, node: fx.Node, rows: Rows) -> Rows:
    """`rows[..., a:b]`, an item of `chunk`, and `rows[..., None]`."""
    index = node.args[1]
    if isinstance(rows.value, Op) and rows.value.name in ("chunk", "split") and fake_tensor(node.args[0]) is None:
        return Rows(rows.labels, graph.same_op(node, (rows.value, index), {}, rows.labels))
    count, rank = len(rows.labels), known_tensor(node.args[0]).dim()
    items = list(index) if isinstance(index, tuple) else [index]
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    kept = sum(item is not None and item is not Ellipsis for item in items)
    items[at : at + 1] = [slice(None)] * (rank - kept)
    if rows.unit or items[:count] != [slice(None)] * count or any(isinstance(item, fx.Node) for item in items):
        raise refused(node)
    own = tuple(items[count:])
    if own in ((slice(None), None), (None, slice(None))):
        return Rows(rows.labels, rows.value, "after" if own[1] is None else "before")
    return Rows(rows.labels, graph.same_op(node, (rows.value, (slice(None), *own)), {}, rows.labels))
