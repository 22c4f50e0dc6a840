"""What the loop forms share: from the accumulations of a loop to its region."""

from torch import fx

from fx_passes.accumulation import closure, expert_rows
from fx_passes.body import NotIsomorphic, UnknownOperation, unify
from fx_passes.facts import Hit, Mask, Selection, fact
from fx_passes.markers import current_expert
from fx_passes.region import Accumulation, MoERegion, Rejected


def masks_of(found: list[Accumulation]) -> tuple[Mask, ...]:
    """The expert mask behind each accumulation. All must be masks of the same ids."""
    masks = []
    for accumulation in found:
        rows = expert_rows(accumulation.tokens)
        assert rows is not None
        masks.append(rows.mask)
    if len({mask.ids for mask in masks}) != 1:
        raise Rejected(
            "one_routing_selects_all_rows", found[0].result, "the experts select their tokens by different ids"
        )
    return tuple(masks)


def region_of(
    form: str,
    accumulator: fx.Node,
    found: list[Accumulation],
    masks: tuple[Mask, ...],
    num_experts: int,
    symbol: fx.Node | None,
) -> MoERegion:
    """The region of the accumulations `found` (in graph order), of which number i adds the rows of `masks[i]`.

    Raises Rejected where the experts' bodies are not the same computation.
    """
    order = sorted(range(len(found)), key=lambda place: _number(masks[place]))
    try:
        body = unify([found[place].value for place in order], [masks[place] for place in order])
    except NotIsomorphic as reason:
        raise Rejected("bodies_are_isomorphic", reason.node, reason.detail) from reason
    except UnknownOperation as reason:
        raise Rejected("operations_are_known", reason.node, f"an expert calls `{reason}`") from reason
    adds = frozenset(node for accumulation in found for node in accumulation.nodes)
    starts = _starts(accumulator.graph, masks)
    inner = closure(starts, stops=frozenset(accumulation.result for accumulation in found)) | adds
    return MoERegion(form, masks[0].ids, num_experts, body, accumulator, tuple(found), masks, inner, symbol)


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
