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
    """Raises Rejected where the experts' bodies are not the same computation."""
    try:
        body = unify([accumulation.value for accumulation in found], masks)
    except NotIsomorphic as reason:
        raise Rejected("bodies_are_isomorphic", reason.node, reason.detail) from reason
    except UnknownOperation as reason:
        raise Rejected("operations_are_known", reason.node, f"an expert calls `{reason}`") from reason
    adds = frozenset(node for accumulation in found for node in accumulation.nodes)
    starts = (node for node in accumulator.graph.nodes if _starts_region(node, masks, symbol))
    inner = closure(starts, stops=frozenset(accumulation.result for accumulation in found)) | adds
    return MoERegion(form, masks[0].ids, num_experts, body, accumulator, tuple(found), masks, inner, symbol)


def _starts_region(node: fx.Node, masks: tuple[Mask, ...], symbol: fx.Node | None) -> bool:
    known = fact(node)
    if isinstance(known, Selection):
        return known.mask in masks
    if isinstance(known, Hit) and symbol is not None:
        return known.ids is masks[0].ids
    if node.target is current_expert:
        return node is symbol or (symbol is None and isinstance(fact(node.args[0]), Hit))
    return False
