"""What the loop forms share: from the accumulations of a loop to its region."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fx_passes.body.segment_body import numbers_of_slots
from fx_passes.body.unify import unify
from fx_passes.body.values import Body
from fx_passes.capture import guards_of
from fx_passes.facts import chosen, fact
from fx_passes.facts.ids import num_choices
from fx_passes.facts.slot_sum import SlotSum
from fx_passes.facts.statements import Counts, Fact, Hit, Listed, Mask, Occupied, Selection
from fx_passes.forms.accumulation import accumulations, closure
from fx_passes.graph.aliasing import made_by
from fx_passes.graph.markers import current_expert, expert_segment, place_among_hits
from fx_passes.graph.ops import EMPTY, ZEROS, fake_tensor, known_tensor, op_name
from fx_passes.region import Accumulation, LoopRegion, Rejected, mismatches_rejected
from fx_passes.report import GRADIENTS, RANGE, UNWRITTEN

Known = dict[fx.Node, Fact]
"""What nodes say about the routing."""


@dataclass(frozen=True)
class Loop:
    """The accumulations, in graph order, that start from one accumulator.

    `earlier` are those of the same loop that came before and are no part of this: the output goes on from their sum.
    """

    accumulator: fx.Node
    found: tuple[Accumulation, ...]
    earlier: tuple[Accumulation, ...] = ()

    @property
    def symbol(self) -> fx.Node | None:
        """The expert of the first accumulation, where it has no number."""
        expert = mask_of(self.found[0]).expert
        return expert if isinstance(expert, fx.Node) else None

    @property
    def is_over_hits(self) -> bool:
        """Whether it runs over the experts that have a token, as one iteration."""
        return self.symbol is not None and self.symbol.target is current_expert

    @property
    def assigns(self) -> bool:
        return any(accumulation.assigns for accumulation in self.found)

    @property
    def is_flat(self) -> bool:
        """Whether its output has a row for each slot."""
        found = chosen(self.found[0].tokens)
        return found is not None and found[1] == "N"

    @property
    def is_by_slot(self) -> bool:
        """Whether it adds the tokens that one slot sends to an expert."""
        return mask_of(self.found[0]).slot is not None


def loops(graph: fx.Graph) -> Iterator[Loop]:
    for (accumulator, place), found in accumulations(graph).items():
        if place is None:
            yield Loop(accumulator, tuple(found))


def mask_of(accumulation: Accumulation) -> Mask:
    found = chosen(accumulation.tokens)
    assert found is not None
    return found[0]


def masks_of(loop: Loop) -> tuple[Mask, ...]:
    """The expert mask behind each accumulation. All must be masks of the same ids."""
    masks = tuple(mask_of(accumulation) for accumulation in loop.found)
    if len({mask.ids for mask in masks}) != 1:
        raise Rejected(
            "one_routing_selects_all_rows", loop.found[0].result, "the experts select their tokens by different ids"
        )
    return masks


def region_of(
    form: str, loop: Loop, masks: tuple[Mask, ...], num_experts: int, total: SlotSum | None = None
) -> LoopRegion:
    """The region of `loop`, of which accumulation number i adds the rows of `masks[i]`.

    Where the loop has a row for each slot, `total` sums over these.

    Raises Rejected where the experts' bodies are not the same computation.
    """
    found = loop.found
    order = sorted(range(len(found)), key=lambda place: (_number(masks[place]), masks[place].slot or 0))
    with mismatches_rejected():
        body = unify([found[place].value for place in order], [masks[place] for place in order])
    result = total.result if total is not None else found[-1].result
    output = fake_tensor(total.result if total is not None else loop.accumulator)
    if output is None:
        raise Rejected("accumulator_may_be_added_to", loop.accumulator, "the loop adds to something that is no tensor")
    additions = frozenset(node for accumulation in found for node in accumulation.nodes)
    stops = frozenset(accumulation.result for accumulation in found)
    known = {node: said for node in loop.accumulator.graph.nodes if (said := fact(node)) is not None}
    inner = closure(_starts(known, masks, body), stops) | additions
    if total is not None:
        inner |= closure(total.nodes[:1], stops=frozenset((result,))) | {result}
        additions |= {*total.nodes}
        body = body.scaled(total.weights) if total.weights is not None else body
    routing = _routing(loop, known, masks[0].ids, inner)
    return LoopRegion(
        form=form,
        ids_TK=masks[0].ids,
        top_k=num_choices(masks[0].ids),
        num_experts=num_experts,
        body=body,
        routing=routing,
        inner=inner,
        result=result,
        output=output,
        writes=additions | body.writes,
        deviations=tuple(_deviations(loop, additions, routing)),
        addend=_addend(loop),
        token_dims=_token_dims(loop) if total is None else 1,
        accumulator=loop.accumulator,
        accumulations=found,
        earlier=frozenset(node for accumulation in loop.earlier for node in accumulation.nodes),
        masks=masks,
        symbol=loop.symbol,
        base=_base(loop),
        first_expert=_number(masks[order[0]]),
    )


def _token_dims(loop: Loop) -> int:
    """In how many dims the output has its tokens: as many as the first addition picks by."""
    tokens = loop.found[0].tokens
    if isinstance(tokens, tuple):
        return len(tokens)
    return known_tensor(tokens).dim() if isinstance(fact(tokens), Mask) else 1


def _base(loop: Loop) -> fx.Node | None:
    """What tokens without an expert keep, where experts assign and that isn't zero or undefined."""
    return loop.accumulator if loop.assigns and not loop.is_flat and not _starts_blank(loop) else None


def _addend(loop: Loop) -> fx.Node | None:
    """What the experts' sum is added to, where that isn't zero: a shared expert's output, earlier experts' sum."""
    adds_to_more = not loop.assigns and not loop.is_flat and not _starts_blank(loop)
    return loop.accumulator if loop.earlier or adds_to_more else None


def _starts_blank(loop: Loop) -> bool:
    return op_name(made_by(loop.accumulator)) in ZEROS | EMPTY


def _deviations(loop: Loop, additions: frozenset[fx.Node], routing: frozenset[fx.Node]) -> Iterator[str]:
    """Where the rewritten loop may differ from eager."""
    if any(guards_of(node) for node in additions):
        yield GRADIENTS
    if any(op_name(node) == "one_hot" for node in routing):
        yield RANGE
    if op_name(made_by(loop.accumulator)) in EMPTY:
        yield UNWRITTEN


def _routing(loop: Loop, known: Known, ids: fx.Node, inner: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Nodes between the ids and the row positions, and what guards ask: one_hot, permute, comparison, where, any."""
    nodes: set[fx.Node] = set()
    stack = [node for accumulation in loop.found for node in accumulation.token_nodes]
    stack += [node for node, said in known.items() if isinstance(said, Occupied) and said.mask.ids is ids]
    stack += [source for node in inner for source in node.all_input_nodes if source not in inner]
    stack += [loop.symbol] if loop.symbol is not None else []
    while stack:
        node = stack.pop()
        if node not in nodes and node is not ids and (fact(node) is not None or node is loop.symbol):
            nodes.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(nodes)


def _number(mask: Mask) -> int:
    return mask.expert if isinstance(mask.expert, int) else 0


def _starts(known: Known, masks: tuple[Mask, ...], body: Body) -> set[fx.Node]:
    """Where the loop begins: what takes the rows of an expert, and the list of hit experts that a loop ran over."""
    ids, keys = masks[0].ids, {mask.key for mask in masks}
    starts = set(numbers_of_slots(ids.graph, ids))
    for node, said in known.items():
        if isinstance(said, Selection) and said.mask.key in keys:
            starts.add(node)
        if isinstance(said, Listed) and said.one_hot.ids is ids:
            starts.add(node)
        if isinstance(said, Mask) and said.key in keys:
            starts.update(user for user in node.users if _is_index(node, user) or _is_factor(user, body))
        if isinstance(said, Counts) and said.ids is ids:
            starts.update(user for user in node.users if user.target is expert_segment and user.args[1] is node)
        if _lists_hits(said, masks) and _is_read_in_python(node):
            starts.add(node)
        if any(user.target is current_expert for user in node.users):
            starts.update(_hit_list(node, masks))
    return starts


def _is_index(mask: fx.Node, user: fx.Node) -> bool:
    """Whether a boolean mask of an expert picks from a tensor in `user`."""
    if op_name(user) not in ("getitem", "setitem"):
        return False
    index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    return any(item is mask for item in index)


def _is_factor(user: fx.Node, body: Body) -> bool:
    """Whether the mask of an expert is multiplied by something in `user`, or the like."""
    return user in body.nodes and fact(user) is None


def _is_read_in_python(hit: fx.Node) -> bool:
    """Whether nothing in the graph but its length is made of a list of hit experts, as of one that became numbers."""
    return all(
        user.target in (torch.ops.aten.sym_size.int, place_among_hits)
        or (isinstance(fact(user), Hit) and _is_read_in_python(user))
        for user in hit.users
    )


def _lists_hits(said: Fact | None, masks: tuple[Mask, ...]) -> bool:
    """Whether `said` is of a list of the experts that the ids of `masks` hit, in a slot of theirs or in any."""
    return isinstance(said, Hit) and said.ids is masks[0].ids and said.slot in (None, *(mask.slot for mask in masks))


def _hit_list(node: fx.Node, masks: tuple[Mask, ...]) -> set[fx.Node]:
    """`node` and what it was sliced or squeezed from, as far as it lists the hit experts of `masks`."""
    nodes: set[fx.Node] = set()
    known = fact(node)
    while _lists_hits(known, masks):
        nodes.add(node)
        node = node.all_input_nodes[0]
        known = fact(node)
    return nodes
