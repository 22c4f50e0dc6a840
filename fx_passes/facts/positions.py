"""Positions: where a mask is true, and which experts have a token.

T tokens, K experts per token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from fx_passes.facts.gate_masks import open_gates
from fx_passes.facts.ids import ids_dims, num_columns
from fx_passes.facts.masks import by_token, column_of_ids, flat_ids, permute, squeeze, transpose
from fx_passes.facts.statements import (
    TOKENS_BY_BATCH,
    Counts,
    Fact,
    Hit,
    Kept,
    Listed,
    ListedMask,
    Mask,
    OneHot,
    Rows,
    Selection,
    SlotOf,
    with_one_token_dim,
)
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name, same_size, same_sizes
from fx_passes.graph.views import is_transposed


def _nonzero(node: fx.Node, inner: Fact | None) -> Fact | None:
    as_tuple = bool(node.kwargs.get("as_tuple", False))
    if isinstance(inner, Counts) and (inner.positive or inner.may_be_hits):
        return Hit(inner.ids, inner.num_classes, as_tuple)
    if isinstance(inner, OneHot):
        return Listed(inner) if as_tuple and not inner.reduced else None
    inner = open_gates(arg(node, 0, "input")) if inner is None else inner
    return Selection(inner, as_tuple) if isinstance(inner, Mask) else None


def _unbind(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`mask.nonzero().unbind(-1)`: its columns; `mask.nonzero().t().unbind()`."""
    along = (0, -2) if isinstance(inner, Selection) and inner.as_tuple else (1, -1)
    return replace(inner, as_tuple=True) if isinstance(inner, Selection) and arg(node, 1, "dim", 0) in along else None


def _transpose(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`mask.nonzero().t()`: the positions along each dim are one entry of it, as in a tuple. And of masks."""
    if isinstance(inner, Selection):
        return replace(inner, as_tuple=True) if not inner.as_tuple and is_transposed(node) else None
    return permute(node, inner) if op_name(node) == "permute" else transpose(node, inner)


def _where(node: fx.Node, inner: Fact | None) -> Fact | None:
    if len(node.args) + len(node.kwargs) != 1:
        return None
    if isinstance(inner, OneHot):
        return Listed(inner) if not inner.reduced else None
    if isinstance(inner, Counts):
        return Hit(inner.ids, inner.num_classes, as_tuple=True) if inner.positive else None
    return Selection(inner, as_tuple=True) if isinstance(inner, Mask) else None


def _unique(node: fx.Node, _inner: Fact | None) -> Fact | None:
    """`ids.unique()`, `ids.view(-1).unique()`, `ids[:, k].unique()`: the classes that occur, ascending."""
    listed = arg(node, 0, "input")
    classes = num_columns(listed) if ids_dims(listed) is not None else None
    if classes is None or len(node.args) + len(node.kwargs) > 1:
        return None
    ids, slot = column_of_ids(listed) or (flat_ids(listed) or listed, None)
    return Hit(ids, classes, slot=slot)


def _flatten(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`hit.squeeze(-1)`, `hit.flatten()`, `hit.view(-1)`: still the classes that occur; so for positions."""
    value = fake_tensor(node)
    if isinstance(inner, Kept):
        return by_token(node, inner)
    if isinstance(inner, (OneHot, Mask)) and op_name(node) != "squeeze":
        return _with_one_token_dim(node, inner)
    if value is None or value.dim() != 1:
        return squeeze(node, inner) if op_name(node) == "squeeze" else None
    if isinstance(inner, Selection) and not inner.as_tuple and inner.mask.dims in (("T",), ("N",)):
        return Rows(inner.mask, inner.mask.dims[0])
    if isinstance(inner, Hit) and not inner.as_tuple:
        return inner
    return squeeze(node, inner) if op_name(node) == "squeeze" else None


def _with_one_token_dim(node: fx.Node, inner: OneHot | Mask) -> Fact | None:
    """`mask.view(-1)`, `mask.flatten(0, 1)`, `mask.view(-1, K)` of a mask with tokens in two dims."""
    before, after = known_tensor(arg(node, 0, "input")), fake_tensor(node)
    if inner.dims[:2] != TOKENS_BY_BATCH or after is None or after.dtype != before.dtype:
        return None
    kept = same_sizes(after.shape[1:], before.shape[2:])
    return replace(inner, dims=with_one_token_dim(inner.dims)) if kept else None


def _divide(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`slots // K` are tokens and `slots % K` their choices."""
    divisor, name = arg(node, 1, "other"), op_name(node)
    if not isinstance(inner, Rows) or inner.axis != "N" or type(divisor) is not int:
        return None
    ids = fake_tensor(inner.mask.ids)
    if ids is None or not same_size(ids.shape[-1], divisor):
        return None
    if name in ("div", "divide") and node.kwargs.get("rounding_mode") != "floor":
        return None
    return Rows(inner.mask, "K" if name in ("mod", "remainder", "fmod") else "T")


def _argmax(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`(ids == e).int().argmax(-1)`, `(ids == e)[tokens].int().argmax(-1)`."""
    dim = arg(node, 1, "dim")
    if not isinstance(inner, Mask) or dim not in (1, -1) or arg(node, 2, "keepdim", False):
        return None
    if inner.dims == ("R", "K"):
        return Rows(inner, "K")
    return SlotOf(inner) if inner.dims == ("T", "K") else None


def _detach(node: fx.Node, inner: Fact | None) -> Fact | None:
    return inner if isinstance(inner, (Hit, Rows)) else None


def index_hits(hit: Hit, index: Any) -> Fact | None:
    """`hit[:]`, `hit[:, 0]`, and the one tensor of a tuple."""
    if hit.as_tuple:
        return replace(hit, as_tuple=False) if index == 0 else None
    return hit if index in (slice(None), (slice(None), 0)) else None


def column(selection: Selection, index: Any) -> Fact | None:
    if not selection.as_tuple:
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)):
            return None
        index = index[1]
    if not isinstance(index, int) or not -len(selection.mask.dims) <= index < len(selection.mask.dims):
        return None
    axis = selection.mask.dims[index]
    return Rows(selection.mask, axis) if axis in ("T", "K", "N", *TOKENS_BY_BATCH) else None


def index_listed(listed: Listed, index: Any, chosen: Fact | None) -> Fact | None:
    """Positions along one dim, and those of one class among them; `chosen` is known of the index."""
    if not listed.axis:
        return replace(listed, axis=listed.one_hot.dims[index]) if type(index) is int and index >= 0 else None
    if not isinstance(chosen, ListedMask) or chosen.one_hot != listed.one_hot or listed.axis not in ("T", "K"):
        return None
    dims = tuple(label for label in chosen.one_hot.dims if label != "E")
    return Rows(Mask(chosen.one_hot.ids, chosen.expert, dims), listed.axis)


RULES: dict[str, Callable[[fx.Node, Fact | None], Fact | None]] = {
    **dict.fromkeys(("squeeze", "flatten", "view", "reshape"), _flatten),
    **dict.fromkeys("floordiv floor_divide div divide mod remainder fmod".split(), _divide),
    "nonzero": _nonzero,
    "where": _where,
    "unique": _unique,
    "unbind": _unbind,
    **dict.fromkeys("t transpose swapaxes permute getattr".split(), _transpose),
    "argmax": _argmax,
    "detach": _detach,
}
