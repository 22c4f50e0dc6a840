"""All slots sorted by expert at once, and grouped products over them: the default of transformers 5.

    experts, order = torch.sort(ids.reshape(-1))
    offsets = torch.cumsum(torch.histc(experts.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
    h = grouped_mm(x[order // K], up.transpose(1, 2), offs=offsets)          # bias: h.add_(up_bias[experts])
    y = grouped_mm(activation(h), down.transpose(1, 2), offs=offsets) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.size(0))
    out = y[inverse].view(T, K, D).sum(1)

`grouped_mm` is torch's or the fallback of transformers. Under expert parallelism ids may be E or more: their rows are
filled with zeros, and `experts` is clamped once the offsets are made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fx_passes.body.slot_body import translate
from fx_passes.facts.slots import Experts, Flat, Inverse, Order, slot_fact
from fx_passes.forms.accumulation import closure
from fx_passes.graph.aliasing import inplace_users
from fx_passes.graph.ops import arg, known_tensor, op_name, same_size
from fx_passes.graph.rounding import with_cast
from fx_passes.region import MoERegion, Rejected

NAME = "sorted_slots"

UNDEFINED = "ids outside 0..E-1 give zeros where grouped_mm leaves their rows undefined"


@dataclass(frozen=True)
class PutBack:
    """`total = rows[inverse].view(...).sum(...)`: rows in `order`, put back into the order of slots."""

    total: fx.Node
    view: fx.Node
    taken: fx.Node
    rows: fx.Node
    inverse: fx.Node
    order: Order


def candidates(graph: fx.Graph) -> Iterator[PutBack]:
    """Sums over rows that were sorted by expert and put back."""
    found = (_put_back(node) for node in graph.nodes if op_name(node) == "sum")
    return (put_back for put_back in found if put_back is not None)


def match(found: PutBack) -> MoERegion:
    _require_sum_over_slots(found)
    result = with_cast(found.total)
    inner = closure([found.order.sort], stops=frozenset((result,))) | {result}
    translated = translate(found.rows, found.order, inner)
    clamps = _clamps(found.order, translated.num_experts)
    return MoERegion(
        form=NAME,
        ids_TK=found.order.ids,
        top_k=int(known_tensor(found.order.ids).shape[1]),
        num_experts=translated.num_experts,
        body=translated.body,
        routing=frozenset(_routing(found.order, inner)),
        inner=inner,
        result=result,
        output=known_tensor(result),
        writes=translated.writes.union(inplace_users(found.inverse), clamps),
        deviations=() if translated.fills_absent else (UNDEFINED,),
    )


def _put_back(total: fx.Node) -> PutBack | None:
    view = arg(total, 0, "input")
    if not isinstance(view, fx.Node) or op_name(view) not in ("view", "reshape", "unflatten"):
        return None
    taken = arg(view, 0, "input")
    if not isinstance(taken, fx.Node) or op_name(taken) not in ("getitem", "index_select"):
        return None
    rows, inverse = arg(taken, 0, "input"), arg(taken, 1 if op_name(taken) == "getitem" else 2, "index")
    if op_name(taken) == "index_select" and arg(taken, 1, "dim") != 0:
        return None
    known = slot_fact(inverse)
    return PutBack(total, view, taken, rows, inverse, known.order) if isinstance(known, Inverse) else None


def _require_sum_over_slots(found: PutBack) -> None:
    """`.view(T, K, D).sum(1)`."""
    before, after = known_tensor(found.taken).shape, known_tensor(found.view).shape
    sizes = (*known_tensor(found.order.ids).shape, *before[1:])
    same = len(after) == len(sizes) == 3 and all(map(same_size, after, sizes))
    dim = arg(found.total, 1, "dim")
    if not same or dim not in (1, -2, (1,), (-2,), [1], [-2]) or arg(found.total, 2, "keepdim", False):
        raise Rejected("slots_of_a_token_are_summed", found.total, "not the sum over dim 1 of [tokens, top_k, width]")


def _clamps(order: Order, num_experts: int) -> list[fx.Node]:
    """`experts.clamp_(max=E - 1)`, once the offsets and the mask of sentinels are made."""
    copies = [node for node in order.sort.users if slot_fact(node) == Experts(order)]
    clamps = [write for experts in copies for write in inplace_users(experts)]
    for write in clamps:
        low, high = arg(write, 1, "min"), arg(write, 2, "max")
        if op_name(write) not in ("clamp_", "clip_") or low not in (None, 0) or high != num_experts - 1:
            raise Rejected("nothing_is_written_inside", write, "the sorted ids are changed")
        for experts in copies:
            _require_told_before(write, experts)
    return clamps


def _require_told_before(write: fx.Node, experts: fx.Node) -> None:
    """What is concluded from the sorted ids was read before `write`, into other memory."""
    for reader in experts.users:
        concluded = slot_fact(reader) is not None
        if concluded and (reader > write or known_tensor(reader).dtype == known_tensor(experts).dtype):
            raise Rejected("nothing_is_written_inside", write, "the sorted ids are changed before they are counted")


def _routing(order: Order, inner: frozenset[fx.Node]) -> Iterator[fx.Node]:
    """The sort, and the flattened ids and weights."""
    yield order.sort
    sources = {source for node in inner for source in node.all_input_nodes if source not in inner}
    yield from (source for source in sources if isinstance(slot_fact(source), Flat))
