"""The sum over a token's slots: `(y.view(T, K, D) * weights.unsqueeze(-1)).sum(1)`, with casts in between.

`y` has a row for each slot n = t * K + k, or is [T, K, D] as it is. T tokens, K experts per token, D model width.
"""

from dataclasses import dataclass
from typing import Any

from torch import fx

from fx_passes.graph.ops import CASTS, arg, fake_tensor, is_inplace, op_name, same_size, same_sizes, sizes_of
from fx_passes.graph.rounding import keeps_digits, with_cast
from fx_passes.graph.views import views_of


@dataclass(frozen=True)
class SlotSum:
    """`rows` [N, D] or [T, K, D] weighted by `weights` [T, K] (None: all alike) and summed.

    `nodes` lead from `rows` to `result`.
    """

    rows: fx.Node
    weights: fx.Node | None
    nodes: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]


def sum_over_slots(total: fx.Node, ids_TK: fx.Node) -> SlotSum | None:
    """The sum that ends in `total`, if its rows are those of the slots of `ids_TK`."""
    if op_name(total) != "sum" or arg(total, 1, "dim") not in (1, -2, (1,), (-2,), [1], [-2]):
        return None
    if arg(total, 2, "keepdim", False) or not _is_float(total):
        return None
    result, weights = with_cast(total), None
    nodes = [total] if result is total else [total, result]
    node: Any = arg(total, 0, "input")
    while isinstance(node, fx.Node) and _is_float(node):
        name = op_name(node)
        if name in ("view", "reshape", "unflatten"):
            return SlotSum(node.args[0], weights, (node, *nodes)) if _is_by_slot(node, ids_TK) else None
        if name in ("mul", "multiply", "mul_", "imul") and weights is None and len(node.args) == 2:
            source, weights = _weighted(node, ids_TK)
        elif name in CASTS and keeps_digits(node, total):
            source = node.args[0]
        else:
            return SlotSum(node, weights, tuple(nodes)) if _has_slots(node, ids_TK) else None
        nodes.insert(0, node)
        node = source
    return None


def _weighted(node: fx.Node, ids_TK: fx.Node) -> tuple[Any, fx.Node | None]:
    """(rows, weights [T, K]) of a product; in place it is the rows that are written."""
    left, right = node.args
    for rows, factor in ((left, right),) if is_inplace(node) else ((left, right), (right, left)):
        weights = _without_last_dim(factor, ids_TK)
        if weights is not None:
            return rows, weights
    return None, None


def _without_last_dim(factor: Any, ids_TK: fx.Node) -> fx.Node | None:
    """`weights` [T, K] behind `weights.unsqueeze(-1)` or the like."""
    shape = fake_tensor(factor)
    if shape is None or shape.dim() != 3 or op_name(factor) not in ("unsqueeze", "getitem", "view", "reshape"):
        return None
    weights = arg(factor, 0, "input")
    own, ids = fake_tensor(weights), fake_tensor(ids_TK)
    if own is None or ids is None or own.dim() != 2 or not own.is_floating_point():
        return None
    same = all(map(same_size, (*shape.shape, *own.shape), (*ids.shape, 1, *ids.shape)))
    return weights if same and (op_name(factor) != "getitem" or _adds_last_dim(factor)) else None


def _adds_last_dim(node: fx.Node) -> bool:
    """`weights[..., None]`. Other indices may have entries of others in the same shape: `weights[:, [1, 0], None]`."""
    return any(view.steps == (node,) and view.dims == ((0,), (1,), ()) for view in views_of(node))


def _is_by_slot(view: fx.Node, ids_TK: fx.Node) -> bool:
    """Whether `view` is `rows.view(T, K, D)`."""
    rows, after, ids = fake_tensor(view.args[0]), fake_tensor(view), fake_tensor(ids_TK)
    if rows is None or after is None or ids is None or (rows.dim(), after.dim(), ids.dim()) != (2, 3, 2):
        return False
    return all(map(same_size, after.shape, (*ids.shape, rows.shape[1])))


def _has_slots(rows: fx.Node, ids_TK: fx.Node) -> bool:
    """Whether `rows` are [T, K, D]."""
    own, ids = sizes_of(rows), sizes_of(ids_TK)
    return len(own) == 3 and same_sizes(own[:2], ids)


def _is_float(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_floating_point()
