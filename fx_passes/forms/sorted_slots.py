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

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_passes.accumulation import closure
from fx_passes.ops import arg, fake_tensor, known_tensor, op_name
from fx_passes.region import MoERegion, Rejected
from fx_passes.slot_body import SlotBody, translate
from fx_passes.slots import Experts, Flat, Inverse, Order, inplace_users, slot_fact

NAME = "sorted_slots"

UNDEFINED = "ids outside 0..E-1 give zeros where grouped_mm leaves their rows undefined"


def candidates(graph: fx.Graph) -> Iterator[fx.Node]:
    """Sums over rows that were sorted by expert and put back."""
    return (node for node in graph.nodes if op_name(node) == "sum" and _put_back(node) is not None)


def match(total: fx.Node) -> MoERegion:
    put_back = _put_back(total)
    assert put_back is not None
    rows, order = put_back
    _require_sum_over_slots(total, order)
    result = _with_cast(total)
    inner = closure([order.sort], stops=frozenset((result,))) | {result}
    found = translate(rows, order, inner)
    writes = found.writes.union(_inverse_writes(total), _clamps(order, found))
    routing = frozenset(node for node in _routing(order, inner, result))
    return MoERegion(
        form=NAME,
        ids_TK=order.ids,
        num_experts=found.num_experts,
        body=found.body,
        routing=routing,
        inner=inner,
        result=result,
        output=known_tensor(result),
        writes=writes,
        deviations=() if found.absent else (UNDEFINED,),
    )


def _put_back(total: fx.Node) -> tuple[fx.Node, Order] | None:
    """The sorted rows behind `rows[inverse].view(...).sum(...)` and their order; None for any other sum."""
    view = arg(total, 0, "input")
    if not isinstance(view, fx.Node) or op_name(view) not in ("view", "reshape", "unflatten"):
        return None
    taken = view.args[0]
    if not isinstance(taken, fx.Node) or op_name(taken) not in ("getitem", "index_select"):
        return None
    index = taken.args[1] if op_name(taken) == "getitem" else arg(taken, 2, "index")
    inverse, rows = slot_fact(index), taken.args[0]
    if not isinstance(inverse, Inverse) or not isinstance(rows, fx.Node):
        return None
    return rows, inverse.order


def _require_sum_over_slots(total: fx.Node, order: Order) -> None:
    """`.view(T, K, D).sum(1)`."""
    view, taken = fake_tensor(total.args[0]), fake_tensor(total.args[0].args[0])
    ids = known_tensor(order.ids)
    dim = arg(total, 1, "dim")
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    wide = view is not None and taken is not None and view.dim() == 3 and taken.dim() == 2
    sizes = (*ids.shape, taken.shape[1]) if wide else ()
    same = wide and all(statically_known_true(a == b) for a, b in zip(view.shape, sizes, strict=True))
    if not same or dims not in ((1,), (-2,)) or arg(total, 2, "keepdim", False):
        raise Rejected("slots_of_a_token_are_summed", total, "not the sum over dim 1 of [tokens, top_k, width]")


def _with_cast(total: fx.Node) -> fx.Node:
    """The cast of `total` where that alone is used and drops digits: the op then rounds once, to its dtype."""
    if len(total.users) != 1:
        return total
    (user,) = total.users
    before, after = fake_tensor(total), fake_tensor(user)
    if op_name(user) != "to" or before is None or after is None or before.device != after.device:
        return total
    narrows = after.is_floating_point() and after.dtype.itemsize <= before.dtype.itemsize
    return user if narrows and before.shape == after.shape else total


def _inverse_writes(total: fx.Node) -> list[fx.Node]:
    """The write that makes the inverse of the order."""
    taken = total.args[0].args[0]
    return [write for index in taken.all_input_nodes[1:] for write in inplace_users(index)]


def _clamps(order: Order, found: SlotBody) -> list[fx.Node]:
    """`experts.clamp_(max=E - 1)`, once the offsets and the mask of sentinels are made."""
    clamps: list[fx.Node] = []
    for experts in order.sort.users:
        if isinstance(slot_fact(experts), Experts):
            for write in inplace_users(experts):
                _require_clamp(write, experts, found.num_experts)
                clamps.append(write)
    return clamps


def _require_clamp(write: fx.Node, experts: fx.Node, num_experts: int) -> None:
    low, high = arg(write, 1, "min"), arg(write, 2, "max")
    keeps = op_name(write) in ("clamp_", "clip_") and (low is None or low == 0) and high == num_experts - 1
    if not keeps:
        raise Rejected("nothing_is_written_inside", write, "the sorted ids are changed")
    for reader in experts.users:
        told = slot_fact(reader) is not None
        if told and (reader > write or known_tensor(reader).dtype == known_tensor(experts).dtype):
            raise Rejected("nothing_is_written_inside", write, "the sorted ids are changed before they are counted")


def _routing(order: Order, inner: frozenset[fx.Node], result: fx.Node) -> Iterator[fx.Node]:
    """The sort, and the flattened ids and weights."""
    yield order.sort
    for node in inner - {result}:
        for source in node.all_input_nodes:
            if source not in inner and isinstance(slot_fact(source), Flat):
                yield source
