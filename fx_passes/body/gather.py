"""What an expert takes from tensors outside the loop: rows of its tokens, and one value for each of its slots.

    x[tokens]    x[mask]    x[None, tokens]                                rows of the tokens
    x.index_select(0, tokens)    x.gather(0, tokens[:, None].expand(-1, D))    the same
    weights[tokens, slots, None]    weights[ids == e]                      the slots' own values
    weights[:, k][mask]    weights[mask, k]    weights[mask][:, k]         the same, where the mask is of slot k
    weights[..., k].reshape(-1)[mask]                                      the same of a batch of sequences
    (weights * (ids == e)).sum(-1)[mask]    weights[mask, slot[mask]]      the same, where a token's ids are distinct
    (weights[mask] * (ids[mask] == e)).sum(-1)    weights[mask][ids[mask] == e]    the same
    gates[tokens, e]    gates[:, e][mask]                                  a table's column of the expert
    x.repeat_interleave(K, 0)[flat == e]    weights.view(-1)[flat == e]    rows and values of slots, where all are flat
    x.unsqueeze(1).expand(-1, K, -1).reshape(-1, D)[flat == e]             the same
    x[order // K][start:end]    weights.view(-1)[order][start:end]         the same, where slots were sorted by expert

Several indexing operations may follow each other: `takings` follows them from the last to a tensor from outside. T
tokens, K experts per token, E experts, C columns, O slots in sorted order, R rows of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fx_passes.body.masked_slots import PRODUCTS, masked
from fx_passes.facts import chosen, chosen_tokens, fact
from fx_passes.facts.ids import ids_dims
from fx_passes.facts.slots import Order, Tokens, order_of, slot_fact
from fx_passes.facts.statements import TOKENS_BY_BATCH, Counts, Mask, Rows, with_one_token_dim
from fx_passes.graph.markers import expert_of, expert_segment, index_with_expert
from fx_passes.graph.ops import (
    FLATTENING,
    arg,
    fake_tensor,
    known_tensor,
    op_name,
    same_size,
    same_sizes,
    sizes_of,
    start_of_one,
)
from fx_passes.graph.row_index import index_of, repeated
from fx_passes.graph.views import View, views_of

MAX_STEPS = 5

_WHOLE = frozenset(("T", "N", "O", *TOKENS_BY_BATCH))
_INDEXES = frozenset(("getitem", "select", "index_select", "gather"))
_STEPS = FLATTENING | _INDEXES | frozenset(("unsqueeze", "squeeze", "sum"))


@dataclass(frozen=True)
class Taking:
    """`source` indexed: `dims` are those of the result.

    "R" rows, "C" columns, "T" (or "B", "S") all tokens, "N" all slots, "O" all slots in sorted order, "1" one.
    `column`: "K" where each row takes the entry of its slot, "E" that of its expert, "" where it takes all.
    `masked`: all entries of a row but that of its slot are zero.
    """

    source: fx.Node
    dims: tuple[str, ...]
    column: str = ""
    masked: bool = False


def takings(node: fx.Node, mask: Mask) -> dict[int, Taking]:
    """How `node` is taken from the tensor that lies 1, 2, ... operations before it, for the rows of `mask`."""
    found: dict[int, Taking] = {}
    steps: list[fx.Node] = []
    source: Any = node
    while len(steps) < MAX_STEPS and isinstance(source, fx.Node) and _is_step(source):
        steps.insert(0, source)
        source = _operand(source)
        taking = _follow(source, steps, mask)
        if taking is not None and _is_of_rows(taking):
            found[len(steps)] = taking
        for view in _repeated_by_slot(source, mask):
            repeated = _followed(Taking(view.start, ("N", *["C"] * (len(view.dims) - 1))), steps, mask)
            if repeated is not None and _is_of_rows(repeated):
                found[len(steps) + len(view.steps)] = repeated
    return found


def _is_of_rows(taking: Taking) -> bool:
    return taking.dims.count("R") == 1 and not _WHOLE & set(taking.dims) and not taking.masked


def chain(node: fx.Node, steps: int) -> Iterator[fx.Node]:
    """The operations that lead from a source to `node`, which lies `steps` behind it."""
    for _ in range(steps):
        yield node
        node = _operand(node)


def _is_step(node: fx.Node) -> bool:
    if node.target in (index_with_expert, expert_segment):
        return True
    if op_name(node) in PRODUCTS:
        return any(masked(node))
    is_piece = op_name(node) == "getitem" and fake_tensor(node.args[0]) is None
    return op_name(node) in _STEPS and fake_tensor(node) is not None and not is_piece


def _operand(node: fx.Node) -> Any:
    """What `node` indexes; of masked weights, these before they were masked."""
    if op_name(node) in PRODUCTS:
        return next(weights for weights, _ in masked(node))
    return arg(node, 0, "input")


def _follow(source: Any, steps: list[fx.Node], mask: Mask) -> Taking | None:
    tensor = fake_tensor(source)
    if tensor is None or tensor.dim() == 0:
        return None
    tokens = _dims_of_tokens(source, mask.ids)
    return _followed(Taking(source, (*tokens, *["C"] * (tensor.dim() - len(tokens)))), steps, mask)


def _repeated_by_slot(source: Any, mask: Mask) -> Iterator[View]:
    """What `source` repeats once for each slot of a token: `x.repeat_interleave(K, 0)`, or a copy that is reshaped."""
    for view in views_of(source):
        rest = tuple((dim,) for dim in range(1, len(view.dims)))
        if view.dims == (("r", 0), *rest) and same_size(sizes_of(source)[0], known_tensor(mask.ids).numel()):
            yield view


def _followed(start: Taking, steps: list[fx.Node], mask: Mask) -> Taking | None:
    state: Taking | None = start
    for step in steps:
        state = _apply(step, state, mask) if state is not None else None
    return state


def _dims_of_tokens(source: fx.Node, ids: fx.Node) -> tuple[str, ...]:
    """In how many dims `source` has its tokens, if it has any."""
    own, dims = sizes_of(source), ids_dims(ids) or ()
    is_by_batch = dims[:2] == TOKENS_BY_BATCH and len(own) > 1 and same_sizes(own[:2], sizes_of(ids)[:2])
    return TOKENS_BY_BATCH if is_by_batch else ("T",)


def _apply(step: fx.Node, state: Taking, mask: Mask) -> Taking | None:
    name = op_name(step)
    if step.target is expert_segment:
        return _segment(step, state, mask)
    if name == "gather" and state.dims == ("R", "C"):
        return _gather(step, state, mask)
    if step.target is index_with_expert or name in _INDEXES:
        index = index_of(step)
        return _index(index, state, mask) if index is not None else None
    if name in PRODUCTS:
        return _mask_slots(step, state, mask)
    if name == "sum":
        return _sum_over_slots(step, state, mask)
    if name == "squeeze":
        is_one = state.dims[-1] == "1" and len(state.dims) == 2 and arg(step, 1, "dim") in (1, -1)
        return replace(state, dims=state.dims[:1]) if is_one else None
    after = fake_tensor(step)
    if name in FLATTENING and state.dims == TOKENS_BY_BATCH and state.column:
        return _column_in_one_dim(after, state)
    if name in FLATTENING and state.dims == ("T", "C") and _has_shape_of(mask.ids, state.source):
        return None if after is None or after.dim() > 2 else _flat(after, state)
    if after is None or len(state.dims) != 1 or after.dim() != 2:
        return None
    if name == "unsqueeze":
        return replace(state, dims=(*state.dims, "1")) if arg(step, 1, "dim") in (1, -1) else None
    return replace(state, dims=(*state.dims, "1")) if after.shape[1] == 1 and state.dims[0] in ("T", "N", "O") else None


def _segment(step: fx.Node, state: Taking, mask: Mask) -> Taking | None:
    """Rows of the expert of `mask`, of all slots in the order in which that mask has them."""
    counts = fact(step.args[1])
    same = isinstance(counts, Counts) and (counts.ids, step.args[2]) == (mask.ids, mask.expert)
    return replace(state, dims=("R", *state.dims[1:])) if same and state.dims[0] == "O" else None


def _column_in_one_dim(after: torch.Tensor | None, state: Taking) -> Taking | None:
    """`weights[..., k].reshape(-1)`, `weights[..., k].reshape(-1, 1)`: a value for each token of a batch."""
    if after is None or after.dim() > 2 or (after.dim() == 2 and not same_size(after.shape[1], 1)):
        return None
    return replace(state, dims=("T", "1")[: after.dim()])


def _flat(after: torch.Tensor, state: Taking) -> Taking | None:
    """`weights.view(-1)` and `weights.view(-1, 1)`: a value for each slot."""
    if after.dim() == 2 and not same_size(after.shape[1], 1):
        return None
    return replace(state, dims=("N", "1")[: after.dim()], column="K")


def _has_shape_of(ids: fx.Node, source: fx.Node) -> bool:
    own, other = sizes_of(ids), sizes_of(source)
    return len(own) == 2 and same_sizes(own, other)


def _gather(step: fx.Node, state: Taking, mask: Mask) -> Taking | None:
    """`weights[tokens].gather(1, slots[:, None])`."""
    slots = repeated(arg(step, 2, "index"), lambda base: isinstance(fact(base), Rows))
    picks = (
        arg(step, 1, "dim") in (1, -1) and slots is not None and not state.masked and same_size(sizes_of(step)[1], 1)
    )
    return replace(state, dims=("R", "1"), column="K") if picks and _column(slots, mask) == "K" else None


def _mask_slots(step: fx.Node, state: Taking, mask: Mask) -> Taking | None:
    """`weights * (ids == e)`, of all tokens or of the expert's own."""
    known = next((known for _, known in masked(step)), None)
    if known is None or state.column or known.key != mask.key or not mask.reduced:
        return None
    fits = state.dims[-1] == "C" and known.dims == (*state.dims[:-1], "K")
    same = fits and same_size(sizes_of(step)[-1], sizes_of(_operand(step))[-1])
    return replace(state, masked=True) if same else None


def _sum_over_slots(step: fx.Node, state: Taking, mask: Mask) -> Taking | None:
    """`(weights * (ids == e)).sum(-1)`: one value a token, that of its slot where it has but one of the expert."""
    *tokens, last = state.dims
    dim = arg(step, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not state.masked or last != "C" or dim not in (-1, len(tokens)) or arg(step, 3, "dtype") is not None:
        return None
    dims = (*tokens, "1") if arg(step, 2, "keepdim", False) else tuple(tokens)
    return replace(state, dims=dims, column="K", masked=False)


def _index(index: Any, state: Taking, mask: Mask) -> Taking | None:
    """`state` indexed by `index`. Items that pick stand side by side, so that rows stay where tokens were."""
    items = _paired(list(index)) if isinstance(index, tuple) else [index]
    used = sum(_consumes(item) for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(state.dims) - used)
        used = len(state.dims)
    if used > len(state.dims):
        return None
    items += [slice(None)] * (len(state.dims) - used)
    left, dims, column, picks = list(state.dims), [], state.column, []
    for item in items:
        labels = [left.pop(0) for _ in range(_consumes(item))]
        picked = _pick(item, labels, mask)
        if picked is None or (picked[1] and column):
            return None
        dims.extend(picked[0])
        column = picked[1] or column
        picks.append(item is not None and item != slice(None))
    if state.masked and (column or "C" not in dims):
        return None
    if picks.count(True) > 1 and False in picks[picks.index(True) : len(picks) - picks[::-1].index(True)]:
        return None
    return replace(state, dims=tuple(dims), column=column)


def _paired(items: list[Any]) -> list[Any]:
    """`items`, of which the two that pick tokens by batch and sequence are one."""
    at = next((at for at in range(len(items) - 1) if _are_tokens(items[at : at + 2])), None)
    return items if at is None else [*items[:at], tuple(items[at : at + 2]), *items[at + 2 :]]


def _are_tokens(items: list[Any]) -> bool:
    """Whether these two items together pick tokens, where neither does alone."""
    return chosen(items[0]) is None and chosen_tokens(tuple(items)) is not None


def _consumes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, tuple):
        return len(item)
    tensor = fake_tensor(item)
    return tensor.dim() if tensor is not None and tensor.dtype == torch.bool else 1


def _pick(item: Any, labels: list[str], mask: Mask) -> tuple[tuple[str, ...], str] | None:
    """(dims that are left, column that was chosen) where `item` indexes dims with these labels."""
    if item is None:
        return ("1",), ""
    if item == slice(None):
        return tuple(labels), ""
    if labels == ["C"]:
        start = start_of_one(item)
        column = _column(item if start is None else start, mask)
        return None if column is None else (() if start is None else ("1",), column)
    if labels in (["T"], ["N"], list(TOKENS_BY_BATCH)):
        rows = chosen(item)
        if rows is not None:
            return (("R",), "") if (rows[1],) == with_one_token_dim(tuple(labels)) and rows[0].picks_as(mask) else None
    order = slot_fact(item)
    if isinstance(order, (Order, Tokens)) and labels == ["T" if isinstance(order, Tokens) else "N"]:
        return (("O",), "") if order_of(order) == Order(mask.ids, mask.sort) else None
    known = fact(item)
    if labels[-1] == "C" and isinstance(known, Mask) and known.dims == (*labels[:-1], "K") and known.picks_as(mask):
        return ("R",), "K"
    return None


def _column(item: Any, mask: Mask) -> str | None:
    """ "K" where `item` is the slot of each row, "E" where it is the expert."""
    known = fact(item) if isinstance(item, fx.Node) else None
    if isinstance(known, Rows):
        return "K" if known.axis == "K" and known.mask.picks_as(mask) else None
    if isinstance(item, fx.Node):
        return "E" if expert_of(item) is not None and expert_of(item) is mask.expert else None
    if type(item) is not int or item < 0:  # which counts columns from the end
        return None
    if mask.slot is not None and item == mask.slot:
        return "K"
    return "E" if item == mask.expert else None
