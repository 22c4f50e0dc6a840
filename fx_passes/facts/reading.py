"""`fact(node)`, and questions that are answered by it."""

from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import fx

from fx_passes.facts import counts, masks, positions, tallies
from fx_passes.facts.ids import has_slots, num_columns, num_tokens
from fx_passes.facts.slots import Experts, Order, Tokens, order_of, slot_fact
from fx_passes.facts.statements import (
    TOKENS_BY_BATCH,
    Counts,
    Fact,
    Hit,
    Kept,
    Listed,
    Mask,
    Occupied,
    OneHot,
    OwnIds,
    Rows,
    Selection,
    SlotOf,
    with_one_token_dim,
)
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.markers import (
    expert_count,
    expert_counts,
    expert_of,
    expert_segment,
    experts_hit,
    index_list,
    select_expert,
)
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name
from fx_passes.graph.views import numbers_tokens_of_slots

_NODES_BACK = 64
"""How many nodes back to look for the counts that a number is made of."""

_CHOICES = frozenset("topk sort argsort argmax max".split())
_COUNTINGS = frozenset("bincount histc index_put index_put_".split())

_RULES = {**masks.RULES, **counts.RULES, **positions.RULES}

_KEPT = ("scatter_moe_fact", "scatter_moe_slot_fact", "scatter_moe_total")


def forget_erased(graph: fx.Graph) -> None:
    """What was read while Dynamo traced may name nodes that it has replaced since, as the results of a checkpoint.

    Everything else stays as it was read: a write that came later says nothing against it.
    """
    for node in graph.nodes:
        for name in _KEPT:
            if _names_erased(node.meta.get(name)):
                del node.meta[name]


def _names_erased(known: Any) -> bool:
    if isinstance(known, fx.Node):
        return known._erased
    parts = known if isinstance(known, tuple) else vars(known).values() if is_dataclass(known) else ()
    return any(map(_names_erased, parts))


def fact(node: Any) -> Fact | None:
    """What `node` says about the routing; None where nothing is known. Results are kept on the node."""
    if not isinstance(node, fx.Node):
        return None
    if "scatter_moe_fact" not in node.meta:
        node.meta["scatter_moe_fact"] = _derive(node)
    return node.meta["scatter_moe_fact"]


def _derive(node: fx.Node) -> Fact | None:
    name = op_name(node) or ""
    if node.target is expert_segment:
        return _segment(node)
    if node.target is select_expert:
        return masks.select(fact(node.args[0]), node.args[2], expert_of(node.args[1]), keepdim=node.args[3])
    if node.target is index_list:
        return fact(node.args[0])
    if node.target is expert_counts:
        return Counts(*node.args)
    if name == "getitem":
        return _getitem(node)
    if name in ("mul", "multiply"):
        return _product(node)
    if name == "stack":
        return _stack(node)
    rule = _RULES.get(name)
    return rule(node, fact(arg(node, 0, "condition" if name == "where" else "input"))) if rule else None


def _segment(node: fx.Node) -> Fact | None:
    """An expert's segment of the slots, or of their tokens, that were sorted by expert."""
    rows, counted, expert = node.args
    order, known = slot_fact(rows), fact(counted)
    if not isinstance(order, (Order, Tokens)) or not isinstance(known, Counts) or order_of(order).ids is not known.ids:
        return None
    mask = Mask(known.ids, expert, ("N",), sort=order_of(order).sort)
    return Rows(mask, "T" if isinstance(order, Tokens) else "N")


def _getitem(node: fx.Node) -> Fact | None:
    if len(node.args) != 2:
        return None
    source, index = node.args
    own = _of_own_tokens(node) or _tokens_of_slots(source, index)
    if own is not None:
        return own
    inner = masks.as_one_hot(fact(source))
    if isinstance(inner, Selection):
        return positions.column(inner, index)
    if isinstance(inner, OneHot):
        return masks.index_one_hot(inner, index)
    if isinstance(inner, Mask):
        return masks.with_new_dims(inner, index)
    if isinstance(inner, Listed):
        return positions.index_listed(inner, index, fact(index))
    if isinstance(inner, SlotOf):
        rows = chosen_tokens(index)
        return Rows(rows, "K") if rows is not None and inner.mask.key == rows.key and rows.reduced else None
    return positions.index_hits(inner, index) if isinstance(inner, Hit) else None


def _of_own_tokens(node: fx.Node) -> Fact | None:
    """What an expert's tokens, each named once, pick: their ids, entries of the expert's own mask, their numbers."""
    source, index = node.args
    tokens, after = chosen_tokens(index), fake_tensor(node)
    if tokens is None or not tokens.reduced or after is None or with_one_token_dim(tokens.dims) != ("T",):
        return None
    if source is tokens.ids and after.dim() == 2:
        return OwnIds(tokens)
    known = fact(source)
    if isinstance(known, Mask) and with_one_token_dim(known.dims) == ("T", "K") and after.dim() == 2:
        return replace(known, dims=("R", "K")) if known.key == tokens.key else None
    is_mask = fake_tensor(index) is not None and known_tensor(index).dtype == torch.bool
    return Rows(tokens, "T") if is_mask and numbers_rows(source, num_tokens(tokens.ids)) else None


def _tokens_of_slots(numbers: fx.Node, index: Any) -> Fact | None:
    """`arange(T).repeat_interleave(K)[slots]`"""
    slots = chosen(index)
    if slots is None or slots[1] != "N":
        return None
    mask, count = slots[0], known_tensor(slots[0].ids).numel()
    return Rows(mask, "T") if numbers_tokens_of_slots(numbers, num_tokens(mask.ids), count) else None


def _stack(node: fx.Node) -> Fact | None:
    """`torch.stack([(ids == e).sum() for e in range(E)])`"""
    parts = arg(node, 0, "tensors")
    masks = [summed_mask(part) for part in parts] if isinstance(parts, (list, tuple)) else []
    first = masks[0] if masks else None
    if first is None or [mask and mask.key for mask in masks] != [(first.ids, e, None) for e in range(len(masks))]:
        return None
    return Counts(first.ids, len(masks), reduced=any(mask.reduced for mask in masks if mask is not None))


def _product(node: fx.Node) -> Fact | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    for factor, other in (node.args, node.args[::-1]):
        known = fact(factor)
        kept = masks.product(node, factor, known, other) if isinstance(known, (OneHot, Kept)) else None
        if kept is not None:
            return kept
    return None


def chosen(index: Any) -> tuple[Mask, str] | None:
    """The mask behind an index that picks the tokens ("T") or slots ("N") of one expert: positions, or the mask.

    Tokens in two dims are picked by a pair of positions, or by a mask that has both; slots in two, [T, K], by a pair.
    """
    index = without_rest(index)
    known, value = fact(index), fake_tensor(index)
    if isinstance(index, tuple):
        return _pair(index)
    if isinstance(known, Rows):
        return (known.mask, known.axis) if known.axis in ("T", "N") else None
    if not isinstance(known, Mask) or value is None or value.dtype != torch.bool:
        return None
    dims = with_one_token_dim(known.dims)
    return (known, dims[0]) if dims in (("T",), ("N",)) else None


def without_rest(index: Any) -> Any:
    """`index` without the `:` and `...` at its end, which take the dims that are left whole."""
    if not isinstance(index, tuple):
        return index
    own = list(index)
    while own and (own[-1] is Ellipsis or own[-1] == slice(None)):
        own.pop()
    return own[0] if len(own) == 1 else tuple(own)


def _pair(index: tuple[Any, ...]) -> tuple[Mask, str] | None:
    """What a pair of positions picks, both those of one mask."""
    first, second = map(fact, index) if len(index) == 2 else (None, None)
    if not isinstance(first, Rows) or not isinstance(second, Rows) or first.mask != second.mask:
        return None
    if (first.axis, second.axis) == TOKENS_BY_BATCH:
        return first.mask, "T"
    return (first.mask, "N") if (first.axis, second.axis) == ("T", "K") and not first.mask.reduced else None


def selected(node: Any) -> Mask | None:
    """The mask of whose slots `node` holds the positions, or something of each."""
    known = fact(node)
    if isinstance(known, (Rows, Selection)):
        return known.mask
    if not isinstance(node, fx.Node) or op_name(node) != "getitem":
        return None
    source = fact(node.args[0])
    if isinstance(source, Selection) and fake_tensor(node) is not None:
        return source.mask
    index, value = fact(node.args[1]), fake_tensor(node.args[1])
    if isinstance(node.args[1], tuple):
        return chosen_tokens(node.args[1]) or _chosen_by_first(node.args[1])
    if isinstance(index, Mask):
        return index if value is not None and value.dtype == torch.bool else None
    return index.mask if isinstance(index, Rows) else None


def _chosen_by_first(index: tuple[Any, ...]) -> Mask | None:
    """`[tokens, k, None]`: what picks tokens, of whose entries other items take a part."""
    takes_parts = all(item is None or type(item) is int or item == slice(None) for item in index[1:])
    return chosen_tokens(index[0]) if index and takes_parts else None


def chosen_tokens(index: Any) -> Mask | None:
    """The mask behind an index that picks the tokens of one expert."""
    found = chosen(index)
    return found[0] if found is not None and found[1] == "T" else None


def summed_mask(total: Any) -> Mask | None:
    """The mask of whose true entries `total` is the number: `(ids == e).sum()`."""
    tensor = fake_tensor(total)
    return counted_mask(total) if tensor is not None and tensor.dtype in (torch.int32, torch.int64) else None


def counted_mask(total: Any) -> Mask | None:
    """So in any dtype, rounded as that does."""
    known = fact(total)
    if not isinstance(known, Occupied) or op_name(total) not in ("sum", "count_nonzero"):
        return None
    node = total
    while isinstance(fact(node), (Mask, Occupied)):
        if any(writers_of(node)):
            return None
        node = arg(node, 0, "input")
    return known.mask


def is_made_of_counts(node: fx.Node) -> bool:
    """Whether `node` is computed from numbers that experts have, of slots or of anything else, and not by a router."""
    return any(_is_counts(source) for source in _sources(node))


def _is_counts(node: fx.Node) -> bool:
    if isinstance(fact(node), (Counts, Occupied)) or _ids_counted_by(node) is not None or _searches(node):
        return True
    return op_name(node) in _COUNTINGS and is_made_of_slots(node)


def is_made_of_slots(node: fx.Node) -> bool:
    """Whether `node` is computed from ids of several slots a token."""
    return any(num_columns(source) is not None and has_slots(source) for source in _sources(node))


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """`node` and what it is computed from, back to choices among classes."""
    seen, stack = {node}, [node]
    while stack and len(seen) < _NODES_BACK:
        node = stack.pop()
        yield node
        new = set(node.all_input_nodes) - seen if op_name(node) not in _CHOICES else set()
        seen |= new
        stack.extend(new)


def _searches(node: fx.Node) -> bool:
    """Whether `node` says where sorted ids change, or what was computed of these at once."""
    if op_name(node) not in ("searchsorted", "unique_consecutive"):
        return False
    values = node.all_input_nodes[0]
    return any(isinstance(slot_fact(source), Experts) for source in (values, *values.all_input_nodes))


def _ids_counted_by(node: fx.Node) -> fx.Node | None:
    """The ids of several slots a token that are counted in some bins, or by which anything is added up."""
    ids = counts.ids_in_bins(node) if op_name(node) == "histc" else tallies.ids_added_by(node)
    return ids if ids is not None and has_slots(ids) else None


def counts_behind(node: fx.Node) -> Counts | None:
    """The counts of which `node` is one, as a Python number, or how many there are."""
    known = fact(node.args[0]) if node.target in (expert_count, experts_hit, torch.ops.aten.sym_size.int) else None
    return known if isinstance(known, Counts) else None
