"""Every token repeated for each of its slots; each expert writes the rows of its slots.

    flat = ids.view(-1)
    rows = x.repeat_interleave(K, dim=0)
    y = torch.empty_like(rows)
    for e, expert in enumerate(experts):
        y[flat == e] = expert(rows[flat == e])
    out = (y.view(T, K, D) * weights.unsqueeze(-1)).sum(1)

Rows may also be weighted as they are written, by `weights.view(-1, 1)[flat == e]`, or written by `y.index_copy_(0,
slots, ...)`. The masks are those of different slots, so that no row is written twice. Slots may have two dims:

    y = x.new_zeros(T, K, D)
    for e, expert in enumerate(experts):
        tokens, slots = torch.where(ids == e)
        y[tokens, slots] = expert(x[tokens])
    out = (y * weights.unsqueeze(-1)).sum(1)
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.facts.slot_sum import SlotSum, sum_over_slots
from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.forms.range_loop import number_of_experts
from fx_passes.region import LoopRegion, Rejected

NAME = "flat_pairs"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if not loop.is_over_hits and loop.is_flat)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    return region_of(NAME, loop, masks, number_of_experts(loop, masks), _sum_of(loop, masks[0].ids))


def _sum_of(loop: Loop, ids_TK: fx.Node) -> SlotSum:
    """The sum that reads the rows once all are written; nothing else may read them."""
    own = {node for accumulation in loop.found for node in accumulation.nodes}
    readers = [user for user in loop.accumulator.users if user not in own]
    for total in loop.accumulator.graph.nodes:
        found = sum_over_slots(total, ids_TK)
        if found is None or found.rows is not loop.accumulator:
            continue
        if readers != [found.nodes[0]]:
            raise Rejected("no_intermediate_escapes", readers[0], "the experts' rows are used outside the experts")
        if found.nodes[0] < loop.found[-1].result:
            raise Rejected("accumulator_is_not_read_inside", found.nodes[0], "rows are read before all are written")
        return found
    raise Rejected(
        "slots_of_a_token_are_summed",
        readers[0] if readers else loop.found[-1].result,
        "not the sum over each token's slots",
    )
