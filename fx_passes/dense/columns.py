"""The weights of one expert for all tokens: a column of a table [T, E], or what its slots of [T, K] add up to.

table[:, e, None]    table[:, e : e + 1]    table.unbind(-1)[e].unsqueeze(-1)    table.t()[e].unsqueeze(-1)
(weights * (ids == e)).sum(-1, keepdim=True)
weights[:, k, None] * (ids[:, k] == e).unsqueeze(-1)                            what one slot of them adds
torch.where((ids == e).any(-1, keepdim=True), scores[:, e, None], 0)            of any table
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fx_passes.facts import fact
from fx_passes.facts.ids import ids_are_distinct, is_single_choice
from fx_passes.facts.statements import Mask, OneHot, with_one_token_dim
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import (
    CASTS,
    ZEROS,
    arg,
    casts_floats,
    example,
    fake_tensor,
    is_last_dim,
    known_tensor,
    normalized_dim,
    only_pick,
    op_name,
    same_sizes,
    sizes_of,
    start_of_one,
)
from fx_passes.graph.rounding import keeps_digits
from fx_passes.graph.views import Dim, views_of

ANY_SLOT = -1
NO_EXPERT = -1
"""Whose column it is where a mask keeps other tokens than those whose weights these are."""
NOT_ZERO = -2
"""Whose it is where what a mask doesn't keep is not zero."""
COUNTS_SLOTS = -3
"""Whose it is where a mask has the number of a token's slots with the expert, which may be several."""


@dataclass(frozen=True)
class Weights:
    """A table [T, E], of which the entries of `ids` count where these are known; or `by_slot` one for each of `ids`."""

    source: fx.Node
    ids: fx.Node | None = None
    by_slot: bool = False


@dataclass(frozen=True)
class Tokens:
    """Those that have `expert` among their `ids`, or in one slot of these.

    Instead of an expert it may be said NO_EXPERT, NOT_ZERO or COUNTS_SLOTS.
    """

    ids: fx.Node
    expert: int
    slot: int


@dataclass(frozen=True)
class Column:
    weights: Weights
    expert: int
    slot: int = ANY_SLOT

    def kept(self, tokens: Tokens) -> "Column":
        """This column for `tokens`, and zero elsewhere. That of a slot was taken for an expert's till now."""
        weights, ids = self.weights, tokens.ids
        if tokens.slot != ANY_SLOT:
            is_own = weights.ids is None and same_sizes(sizes_of(weights.source), sizes_of(ids))
            own = is_own and self.expert == tokens.slot
            weights = Weights(weights.source, ids, by_slot=True)
            return Column(weights, tokens.expert if own or tokens.expert < 0 else NO_EXPERT, tokens.slot)
        own = (weights.ids or ids, self.expert) == (ids, tokens.expert)
        expert = tokens.expert if own or tokens.expert < 0 else NO_EXPERT
        return replace(self, weights=replace(weights, ids=ids), expert=expert)


def column_of(node: Any, dims: int, product: fx.Node) -> Column | None:
    """The expert's weights that `node` is, [T, 1], or [T] before a dim is added; `dims` count tokens.

    It is a factor of `product`.
    """
    if fake_tensor(node) is None:
        return None
    if casts_floats(node):
        return column_of(arg(node, 0, "input"), dims, product) if keeps_digits(node, product) else None
    picked = _picked(node)
    if picked is not None:
        source, dim, expert = picked
        table = _table(source, dim, dims)
        return Column(Weights(table), expert) if table is not None else None
    masked = _masked_sum(node, dims) or _kept_column(node, dims, product)
    if masked is not None:
        return masked
    tokens: tuple[Dim, ...] = tuple((dim,) for dim in range(dims))
    starts = (view.start for view in views_of(node)[:-1] if view.dims in (tokens, (*tokens, ()), (*tokens, (dims,))))
    return next((column for start in starts if (column := column_of(start, dims, product)) is not None), None)


def _picked(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(source, dim, e) where `node` is entry e of `source` along `dim`."""
    name, source = op_name(node), arg(node, 0, "input")
    if name == "select" and type(arg(node, 2, "index")) is int:
        dim, index = arg(node, 1, "dim"), arg(node, 2, "index")
        return (source, dim, index) if index >= 0 and fake_tensor(source) is not None else None
    if name != "getitem":
        return None
    if isinstance(example(source), (tuple, list)):
        return _piece(source, node.args[1])
    return _indexed(source, node.args[1])


def _piece(pieces: fx.Node, index: Any) -> tuple[fx.Node, int, int] | None:
    """Number `index` of what was taken apart into single entries."""
    name, source = op_name(pieces), arg(pieces, 0, "input")
    dim = arg(pieces, 1 if name == "unbind" else 2, "dim", 0)
    tensor = fake_tensor(source)
    if tensor is None or not isinstance(dim, int) or type(index) is not int or index < 0:
        return None
    sizes = {"unbind": 1, "split": arg(pieces, 1, "split_size_or_sections"), "chunk": arg(pieces, 1, "chunks")}
    single = {"unbind": 1, "split": 1, "chunk": tensor.shape[dim]}
    return (source, dim, index) if name in sizes and sizes[name] == single[name] else None


def _indexed(source: fx.Node, index: Any) -> tuple[fx.Node, int, int] | None:
    """`source[..., e]`, `source[:, e : e + 1]`, `source[:, e, None]`."""
    tensor = fake_tensor(source)
    items = list(index) if isinstance(index, tuple) else [index]
    if tensor is None or any(isinstance(item, fx.Node) for item in items):
        return None
    while items[-1:] == [None]:
        items.pop()
    pick = only_pick(items, tensor.dim())
    if pick is None:
        return None
    dim, item = pick
    start = start_of_one(item)
    item = item if start is None else start
    return (source, dim, item) if type(item) is int and item >= 0 else None


def _table(source: fx.Node, dim: int, dims: int) -> fx.Node | None:
    """The table [T, E] whose experts stand along `dim` of `source`."""
    for view in reversed(views_of(source)):
        own = list(view.dims)
        tensor = fake_tensor(view.start)
        if tensor is None or tensor.dim() != dims + 1 or len(own) != dims + 1:
            continue
        if own.pop(normalized_dim(dim, dims + 1)) == (dims,) and own == [(place,) for place in range(dims)]:
            return view.start
    return None


def _masked_sum(node: fx.Node, dims: int) -> Column | None:
    """`(weights * (ids == e)).sum(-1)`, `where(ids == e, weights, 0).sum(-1)`."""
    source = arg(node, 0, "input")
    if op_name(node) != "sum" or not is_last_dim(arg(node, 1, "dim"), source) or "dtype" in node.kwargs:
        return None
    for weights, mask, instead in masked(source):
        chosen = _chosen(mask)
        tensor = fake_tensor(weights)
        if chosen is not None and tensor is not None and tensor.dim() == dims + 1 and tensor.is_floating_point():
            return Column(Weights(weights, chosen[0], by_slot=True), instead or chosen[1])
    return None


def _kept_column(node: fx.Node, dims: int, product: fx.Node) -> Column | None:
    """A column that a mask of the expert's tokens keeps."""
    for weights, mask, instead in masked(node):
        keeps = tokens_of_expert(mask, dims, instead)
        column = column_of(weights, dims, product) if keeps is not None else None
        if column is not None and keeps is not None:
            return column.kept(keeps)
    return None


def tokens_of_expert(mask: Any, dims: int, instead: int | None) -> Tokens | None:
    """The tokens for which `mask` is true; `dims` count tokens. `instead` is said of their expert by `masked`."""
    known, tensor = fact(mask), fake_tensor(mask)
    if not isinstance(known, Mask) or tensor is None or not isinstance(known.expert, int):
        return None
    is_column = known.dims[-1] == "1" or (known.dims[-1] == "K" and is_single_choice(known.ids))
    own = known.dims[:-1] if is_column else known.dims
    by_token = len(own) == dims and with_one_token_dim(own) == ("T",)
    slot = ANY_SLOT if known.slot is None else known.slot
    instead = COUNTS_SLOTS if _counts_slots(mask) else instead
    return Tokens(known.ids, instead or known.expert, slot) if by_token else None


def _counts_slots(mask: fx.Node) -> bool:
    """Whether `mask` is how many slots of a token are the expert's, `(ids == e).sum(-1)`, and these may be several."""
    node, known = mask, fact(mask)
    if not isinstance(known, Mask) or is_single_choice(known.ids) or ids_are_distinct(known.ids):
        return False
    while isinstance(fact(node), (Mask, OneHot)) and known_tensor(node).dtype != torch.bool:
        if op_name(node) in ("sum", "count_nonzero"):
            return True
        node = arg(node, 0, "input")
    return False


def masked(node: Any) -> Iterator[tuple[Any, Any, int | None]]:
    """(weights, mask, None) of a product or a choice that is zero but where `mask` is true.

    NO_EXPERT takes the place of None where weights are kept that `mask` doesn't choose, NOT_ZERO where others stand
    beside those that it does. The mask has the dims of the weights, so that its tokens are theirs.
    """
    for weights, mask, instead in _beside_masks(node):
        sizes = sizes_of(node)
        if len(sizes_of(mask)) == len(sizes) and same_sizes(sizes_of(weights), sizes):
            yield weights, mask, instead


def _beside_masks(node: Any) -> Iterator[tuple[Any, Any, int | None]]:
    if fake_tensor(node) is None:
        return
    name, operands = op_name(node), node.args
    if name in ("mul", "multiply") and len(operands) == 2:
        yield operands[0], operands[1], None
        yield operands[1], operands[0], None
    elif name == "where" and len(operands) == 3:
        mask, kept, rest = operands
        if _negated(mask) is not None:
            mask, kept, rest = _negated(mask), rest, kept
        if _is_zero(kept):
            yield rest, mask, NO_EXPERT
        else:
            yield kept, mask, None if _is_zero(rest) else NOT_ZERO
    elif name == "masked_fill":
        mask, is_zero = arg(node, 1, "mask"), arg(node, 2, "value") == 0
        if _negated(mask) is None:
            yield operands[0], mask, NO_EXPERT
        else:
            yield operands[0], _negated(mask), None if is_zero else NOT_ZERO


def _is_zero(value: Any) -> bool:
    """The number, or fresh zeros."""
    if fake_tensor(value) is not None:
        return op_name(value) in ZEROS and not any(writers_of(value))
    return type(value) in (int, float) and value == 0


def _negated(mask: Any) -> fx.Node | None:
    tensor = fake_tensor(mask)
    if tensor is None or tensor.dtype != torch.bool:
        return None
    return arg(mask, 0, "input") if op_name(mask) in ("invert", "logical_not", "bitwise_not") else None


def _chosen(mask: Any) -> tuple[fx.Node, int] | None:
    """(ids, e) where `mask` is `ids == e`."""
    if fake_tensor(mask) is None:
        return None
    if op_name(mask) in CASTS | {"int", "long", "bool"}:
        return _chosen(arg(mask, 0, "input"))
    ids, expert = arg(mask, 0, "input"), arg(mask, 1, "other")
    tensor = fake_tensor(ids)
    if op_name(mask) != "eq" or type(expert) is not int or tensor is None:
        return None
    return (ids, expert) if tensor.dtype in (torch.int32, torch.int64) else None
