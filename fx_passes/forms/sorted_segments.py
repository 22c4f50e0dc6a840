"""Rows are gathered by token in the order of experts, cut into segments, and added up to tokens again.

    order = ids.flatten().argsort()
    grouped = torch.cat(parts)                           # of segments of x[order // K], as in the form "segments"
    out = zeros.index_add(0, order // K, grouped * weights.flatten()[order, None])           # or scatter_add

or, with a dispatcher of those gates [T, E] that are not zero,

    pairs = gates.nonzero()
    experts, places = pairs.sort(0)
    tokens = pairs[places[:, 1], 0]                      # parts are segments of x[tokens]
    out = zeros.index_add(0, tokens, grouped * gates[tokens].gather(1, experts[:, 1:]))

or put back into the order of slots, and summed:

    slots = torch.empty_like(grouped)
    slots[order] = grouped                               # or slots.index_copy_(0, order, grouped)
    out = (slots.view(T, K, D) * weights.unsqueeze(-1)).sum(1)

Where the rows are gathered or added up in any other way, the segments alone are rewritten.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fx_passes.body.segment_body import numbers_of_slots
from fx_passes.body.slot_body import SlotBody, is_tokens, translate
from fx_passes.capture import guards_of
from fx_passes.facts import fact
from fx_passes.facts.ids import listings_of_gates
from fx_passes.facts.slot_sum import sum_over_slots
from fx_passes.facts.slots import Flat, Inverse, Order, Tokens, slot_fact
from fx_passes.facts.statements import Counts
from fx_passes.forms.accumulation import closure
from fx_passes.graph.aliasing import inplace_users, is_read_before, writers_of
from fx_passes.graph.markers import expert_cat
from fx_passes.graph.ops import EMPTY, ZEROS, arg, fake_tensor, is_inplace, known_tensor, op_name
from fx_passes.graph.row_index import have_one_width, repeated
from fx_passes.region import MoERegion, Rejected
from fx_passes.report import GRADIENTS
from fx_passes.rewriting.leaves import changes_nothing, is_leaf
from fx_passes.rules.loop import is_contiguous

NAME = "sorted_segments"


@dataclass(frozen=True)
class Total:
    """`rows` in `order`, added up by token in `result`, each times its slot's entry of `weights`.

    `nodes` lead from the rows to the result; `buffer` holds the output, too, where it was added in place.
    """

    result: fx.Node
    rows: fx.Node
    order: Order
    nodes: frozenset[fx.Node]
    weights: fx.Node | None = None
    buffer: fx.Node | None = None


def candidates(graph: fx.Graph) -> Iterator[MoERegion]:
    if not any(node.target is expert_cat for node in graph.nodes):
        return
    orders = {known for known in map(slot_fact, graph.nodes) if isinstance(known, Order)}
    for node in graph.nodes:
        found = _added(node) or next(filter(None, (_summed(node, order) for order in orders)), None)
        region = _region(found) if found is not None else None
        if region is not None:
            yield region


def match(region: MoERegion) -> MoERegion:
    return region


def _added(node: fx.Node) -> Total | None:
    """`zeros.index_add(0, tokens, rows)`, or scatter_add of all columns, in place or not."""
    name = op_name(node) or ""
    if name.removesuffix("_") not in ("index_add", "scatter_add") or arg(node, 1, "dim") != 0:
        return None
    zeros, index, rows = arg(node, 0, "input"), arg(node, 2, "index"), arg(node, 3, "source")
    rows = node.kwargs.get("src", rows)
    if name.startswith("scatter"):
        index = _tokens(index, rows, zeros)
    tokens = slot_fact(index)
    is_plain = arg(node, 4, "alpha", 1) == 1 and isinstance(rows, fx.Node) and op_name(zeros) in ZEROS
    if is_leaf(zeros) and not changes_nothing(zeros):
        return None
    if not isinstance(tokens, Tokens) or not is_plain or zeros.kwargs.get("requires_grad", False):
        return None
    if not is_contiguous(fake_tensor(zeros), 2):
        return None
    if set(writers_of(zeros)) - {node} or any(user < node for user in zeros.users):
        return None
    buffer = zeros if is_inplace(node) else None
    return Total(node, rows, tokens.order, frozenset((node,)), buffer=buffer)


def _tokens(index: fx.Node, rows: fx.Node, zeros: fx.Node) -> fx.Node | None:
    return repeated(index, is_tokens) if have_one_width(index, rows, zeros) else None


def _summed(node: fx.Node, order: Order) -> Total | None:
    """The sum over each token's slots, of rows that were put back into the order of slots."""
    found = sum_over_slots(node, order.ids)
    if found is None:
        return None
    rows, own = found.rows, set(found.nodes)
    if op_name(rows) == "getitem" and slot_fact(rows.args[1]) == Inverse(order):
        return Total(found.result, rows.args[0], order, frozenset((*own, rows)), found.weights)
    writes = inplace_users(rows)
    put = writes[0] if len(writes) == 1 and op_name(rows) in EMPTY | ZEROS else None
    index, source = _put(put) if put is not None else (None, None)
    if put is None or slot_fact(index) != order or is_read_before(rows, writes):
        return None
    before, after = fake_tensor(source), known_tensor(rows)
    if before is None or before.dtype != after.dtype or not have_one_width(source, rows):
        return None
    return Total(found.result, source, order, frozenset((*own, rows, put)), found.weights)


def _put(node: fx.Node) -> tuple[Any, Any]:
    """(index, rows) of `slots[index] = rows` and of `slots.index_copy_(0, index, rows)`."""
    if op_name(node) == "setitem":
        return node.args[1], node.args[2]
    is_copy = op_name(node) == "index_copy_" and arg(node, 1, "dim") == 0
    return (arg(node, 2, "index"), arg(node, 3, "source")) if is_copy else (None, None)


def _region(found: Total) -> MoERegion | None:
    graph, order = found.result.graph, found.order
    starts = [order.sort, *listings_of_gates(order.ids), *numbers_of_slots(graph, order.ids)]
    inner = closure(starts, stops=frozenset((found.result,))) | found.nodes
    try:
        translated = translate(found.rows, order, inner)
    except Rejected:
        return None
    if not translated.segments:
        return None
    body = translated.body.scaled(found.weights) if found.weights is not None else translated.body
    guarded = any(guards_of(node) for node in translated.body.nodes)
    return MoERegion(
        form=NAME,
        ids_TK=order.ids,
        top_k=int(known_tensor(order.ids).shape[1]),
        num_experts=translated.num_experts,
        body=body,
        routing=frozenset(_routing(order, inner, translated)),
        inner=inner,
        result=found.result,
        output=known_tensor(found.result),
        writes=translated.writes.union(node for node in found.nodes if is_inplace(node)),
        deviations=(GRADIENTS,) if guarded else (),
        buffers=(found.buffer,) if found.buffer is not None else (),
    )


def _routing(order: Order, inner: frozenset[fx.Node], translated: SlotBody) -> Iterator[fx.Node]:
    """The sort, the counts, and the flattened ids and weights."""
    yield order.sort
    yield from listings_of_gates(order.ids)
    yield from translated.segments
    sources = {source for node in inner for source in node.all_input_nodes if source not in inner}
    yield from (source for source in sources if isinstance(slot_fact(source), Flat) or isinstance(fact(source), Counts))
