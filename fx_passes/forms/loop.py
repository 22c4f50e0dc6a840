"""What the loop forms share: from the accumulations of a loop to its region."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fx_passes.accumulation import accumulations, closure, expert_rows
from fx_passes.body import NotIsomorphic, UnknownOperation, unify
from fx_passes.capture import guards_of
from fx_passes.facts import Hit, Mask, Selection, fact
from fx_passes.markers import current_expert
from fx_passes.ops import fake_tensor, known_tensor, op_name
from fx_passes.region import Accumulation, LoopRegion, Rejected
from fx_passes.report import GRADIENTS, RANGE


@dataclass(frozen=True)
class Loop:
    """The accumulations, in graph order, that start from one accumulator."""

    accumulator: fx.Node
    found: tuple[Accumulation, ...]

    @property
    def symbol(self) -> fx.Node | None:
        """The expert of the first accumulation, where it has no number."""
        expert = _mask(self.found[0]).expert
        return expert if isinstance(expert, fx.Node) else None


def loops(graph: fx.Graph) -> Iterator[Loop]:
    for accumulator, found in accumulations(graph).items():
        yield Loop(accumulator, tuple(found))


def _mask(accumulation: Accumulation) -> Mask:
    rows = expert_rows(accumulation.tokens)
    assert rows is not None
    return rows.mask


def masks_of(loop: Loop) -> tuple[Mask, ...]:
    """The expert mask behind each accumulation. All must be masks of the same ids."""
    masks = tuple(_mask(accumulation) for accumulation in loop.found)
    if len({mask.ids for mask in masks}) != 1:
        raise Rejected(
            "one_routing_selects_all_rows", loop.found[0].result, "the experts select their tokens by different ids"
        )
    return masks


def region_of(form: str, loop: Loop, masks: tuple[Mask, ...], num_experts: int) -> LoopRegion:
    """The region of `loop`, of which accumulation number i adds the rows of `masks[i]`.

    Raises Rejected where the experts' bodies are not the same computation.
    """
    found = loop.found
    order = sorted(range(len(found)), key=lambda place: _number(masks[place]))
    try:
        body = unify([found[place].value for place in order], [masks[place] for place in order])
    except NotIsomorphic as reason:
        raise Rejected("bodies_are_isomorphic", reason.node, reason.detail) from reason
    except UnknownOperation as reason:
        raise Rejected("operations_are_known", reason.node, f"an expert calls `{reason}`") from reason
    output = fake_tensor(loop.accumulator)
    if output is None:
        raise Rejected("accumulator_starts_as_zeros", loop.accumulator, "the loop adds to something that is no tensor")
    additions = frozenset(node for accumulation in found for node in accumulation.nodes)
    routing = _routing(loop, masks[0].ids)
    stops = frozenset(accumulation.result for accumulation in found)
    return LoopRegion(
        form=form,
        ids_TK=masks[0].ids,
        top_k=_top_k(masks[0].ids),
        num_experts=num_experts,
        body=body,
        routing=routing,
        inner=closure(_starts(loop.accumulator.graph, masks), stops) | additions,
        result=found[-1].result,
        output=output,
        writes=additions,
        deviations=tuple(_deviations(additions, routing)),
        accumulator=loop.accumulator,
        accumulations=found,
        masks=masks,
        symbol=loop.symbol,
    )


def _top_k(ids: fx.Node) -> int:
    tensor = known_tensor(ids)
    return int(tensor.shape[1]) if tensor.dim() == 2 else 1


def _deviations(additions: frozenset[fx.Node], routing: frozenset[fx.Node]) -> Iterator[str]:
    """Where the rewritten loop may differ from eager."""
    if any(guards_of(node) for node in additions):
        yield GRADIENTS
    if any(op_name(node) == "one_hot" for node in routing):
        yield RANGE


def _routing(loop: Loop, ids: fx.Node) -> frozenset[fx.Node]:
    """Nodes between the ids and the row positions: one_hot, permute, comparison, where."""
    nodes: set[fx.Node] = set()
    stack = [accumulation.tokens for accumulation in loop.found]
    stack += [loop.symbol] if loop.symbol is not None else []
    while stack:
        node = stack.pop()
        if node not in nodes and node is not ids and (fact(node) is not None or node is loop.symbol):
            nodes.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(nodes)


def _number(mask: Mask) -> int:
    return mask.expert if isinstance(mask.expert, int) else 0


def _starts(graph: fx.Graph, masks: tuple[Mask, ...]) -> set[fx.Node]:
    """Where the loop begins: the row positions of each expert, and the list of hit experts that a loop ran over."""
    starts: set[fx.Node] = set()
    for node in graph.nodes:
        known = fact(node)
        if isinstance(known, Selection) and known.mask in masks:
            starts.add(node)
        if node.target is current_expert:
            starts.update(_hit_list(node.args[0], masks[0].ids))
    return starts


def _hit_list(node: fx.Node, ids: fx.Node) -> set[fx.Node]:
    """`node` and what it was sliced or squeezed from, as far as it lists the hit experts of `ids`."""
    nodes: set[fx.Node] = set()
    known = fact(node)
    while isinstance(known, Hit) and known.ids is ids:
        nodes.add(node)
        node = node.all_input_nodes[0]
        known = fact(node)
    return nodes
