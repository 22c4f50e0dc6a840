"""Experts of their own, each on every token, and weights that are zero but for the top-k.

    for e, expert in enumerate(experts):
        out = out + table[:, e, None] * expert(x)                            # table: zeros.scatter(1, ids, weights)

    out = sum((weights * (ids == e)).sum(-1, keepdim=True) * expert(x) for e, expert in enumerate(experts))

    y = torch.stack([expert(x) for expert in experts], 1)                    # [T, E, D]
    out = (y * table.unsqueeze(-1)).sum(1)                                   # or einsum, or bmm
    out = (y.gather(1, ids.unsqueeze(-1).expand(-1, -1, D)) * weights.unsqueeze(-1)).sum(1)

    out = out + torch.where((ids == e).any(-1, keepdim=True), scores[:, e, None] * expert(x), 0)

The mask, or that of a top-1 router's tokens, may as well stand by the weights. It may be that of one slot, and there is
such a term for each slot and expert:

    out = out + (ids[:, k] == e).unsqueeze(-1) * weights[:, k, None] * expert(x)

The experts may read masked rows, `expert(x * mask)`, where the mask holds for all tokens that count.
Tokens may be counted by several dims,
[B, S, D]. A mixture in which every expert counts is left as it is.
"""

from torch import fx

from fx_passes.dense.columns import ANY_SLOT, COUNTS_SLOTS, NO_EXPERT, NOT_ZERO, Tokens, Weights
from fx_passes.dense.stacks import summed_stacks
from fx_passes.dense.sums import Mixture, weighted_sums
from fx_passes.dense.token_body import token_body
from fx_passes.facts.ids import ids_are_distinct, is_single_choice, num_choices
from fx_passes.facts.sparsity import chosen_by
from fx_passes.forms.dense_experts import UNCHOSEN
from fx_passes.graph.ops import is_inplace, known_tensor, same_size
from fx_passes.region import MoERegion, Rejected

NAME = "dense_modules"


def candidates(graph: fx.Graph) -> list[Mixture | Rejected]:
    """In the order of the graph."""
    return sorted((*weighted_sums(graph), *summed_stacks(graph)), key=_end)


def _end(found: Mixture | Rejected) -> fx.Node:
    node = found.result if isinstance(found, Mixture) else found.node
    assert node is not None
    return node


def match(found: Mixture | Rejected) -> MoERegion:
    if isinstance(found, Rejected):
        raise found
    order = _order(found)
    ids = _chosen(found)
    slots = found.slots or (ANY_SLOT,) * len(order)
    counted = tuple(Tokens(ids, found.experts[place], slots[place]) for place in order)
    body, computed, masks = token_body(tuple(found.outputs[place] for place in order), counted, found.scaling)
    if masks and found.counts_from_the_end:
        detail = "a mask leaves out the tokens whose ids count experts from the end"
        raise Rejected("every_expert_is_covered", found.result, detail)
    output, dims = known_tensor(found.result), known_tensor(found.outputs[0]).dim() - 1
    inner = computed.union(found.nodes)
    return MoERegion(
        form=NAME,
        ids_TK=ids,
        top_k=int(known_tensor(ids).shape[-1]) if known_tensor(ids).dim() > dims else 1,
        num_experts=len(set(found.experts)),
        body=body.scaled(found.weights.source, table=not found.weights.by_slot),
        routing=inner | _columns(found, masks),
        inner=inner,
        result=found.result,
        output=output,
        writes=frozenset(node for node in found.nodes if is_inplace(node)),
        deviations=(UNCHOSEN,),
        token_dims=dims,
        addend=found.addend,
        counts_from_the_end=found.counts_from_the_end,
    )


def _order(found: Mixture) -> list[int]:
    """The places of experts 0, 1, ... among the outputs; each stands there for all slots, or once for each."""
    pairs = list(zip(found.experts, found.slots or (ANY_SLOT,) * len(found.experts), strict=True))
    if NO_EXPERT in found.experts:
        detail = "a mask keeps other tokens than those of the expert, or of another slot"
        raise Rejected("every_expert_is_covered", found.result, detail)
    if NOT_ZERO in found.experts:
        detail = "tokens that did not choose an expert get something else than zero of it"
        raise Rejected("weights_are_zero_outside_the_top_k", found.result, detail)
    if COUNTS_SLOTS in found.experts:
        detail = "a mask counts the slots of a token that have the expert, and its ids may repeat"
        raise Rejected("repeated_ids_are_counted", found.result, detail)
    weights, count = found.weights, len(set(found.experts))
    slots = (ANY_SLOT,) if pairs[0][1] == ANY_SLOT else range(num_choices(weights.ids or weights.source))
    width = known_tensor(weights.source).shape[-1] if not weights.by_slot else count
    covered = [(expert, slot) for expert in range(count) for slot in slots]
    if sorted(pairs) != covered or not same_size(width, count):
        raise Rejected(
            "every_expert_is_covered",
            found.result,
            f"outputs of experts {sorted(found.experts)[:8]}, and weights of {width}",
        )
    return sorted(range(len(pairs)), key=pairs.__getitem__)


def _chosen(found: Mixture) -> fx.Node:
    """The ids outside of which an expert has weight zero."""
    weights: Weights = found.weights
    if weights.by_slot and weights.ids is not None:
        return weights.ids
    chosen = weights.ids or chosen_by(weights.source)
    if chosen is None:
        raise Rejected(
            "weights_are_zero_outside_the_top_k", found.result, "every expert may count for every token: it stays dense"
        )
    if not is_single_choice(chosen) and not ids_are_distinct(chosen):
        raise Rejected("repeated_ids_are_counted", found.result, "the ids of a token may repeat")
    return chosen


def _columns(found: Mixture, masks: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """What lies between the weights and the products with them, or between the ids and `masks`."""
    stops = {found.weights.source, found.weights.ids, found.addend, *found.outputs, *found.nodes}
    first = min(source for source in (found.weights.source, found.weights.ids) if source is not None)
    seen: set[fx.Node] = set()
    stack = [*masks, *(source for node in found.nodes for source in node.all_input_nodes)]
    while stack:
        node = stack.pop()
        if node not in stops and node not in seen and node > first:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return frozenset(seen)
