"""A loop over slots and experts, in either order, with a mask for each pair.

    for k in range(K):
        for e in range(E):
            m = ids[:, k] == e
            if m.any():                                  # or no guard, or `for e in ids[:, k].unique().tolist()`
                out[m] += experts[e](x[m]) * weights[m, k, None]

Tokens are distinct within one mask, so that `+=` adds each of them.
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.graph.ops import known_tensor
from fx_passes.region import LoopRegion, Rejected

NAME = "slot_loop"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if loop.symbol is None and loop.is_by_slot and not loop.assigns)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    pairs = [(mask.slot, mask.expert) for mask in masks]
    num_experts, top_k = len({expert for _, expert in pairs}), known_tensor(masks[0].ids).shape[-1]
    covered = {(slot, expert) for slot in range(top_k) for expert in range(num_experts)}
    if len(pairs) != len(covered) or set(pairs) != covered:
        raise Rejected(
            "every_expert_is_covered",
            loop.found[0].result,
            f"the loop runs over {len(set(pairs))} pairs of slot and expert in {len(pairs)} steps, "
            f"not once over each of {top_k} slots and of experts 0..{num_experts - 1}",
        )
    return region_of(NAME, loop, masks, num_experts)
