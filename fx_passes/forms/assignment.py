"""Top-1 experts that assign the rows of their tokens.

    for e, expert in enumerate(experts):
        m = ids == e                                     # ids [T], or one_hot(ids, E)[:, e].bool()
        out[m] = expert(x[m]) * probs[m, None]

or `out.index_copy_(0, tokens, ...)`. Tokens may stay in two dims, with ids [B, S] and a mask of that shape, or pairs of
positions. All tokens may be listed first, and all experts run before the first row is assigned: `out[tokens[e], :] =
outputs[e]`. What counts the listed tokens, `torch.tensor([len(t) for t in tokens])`, stays. `out` starts as zeros, as
`empty_like(x)`, or as `x.clone()` or the like: tokens without an expert then keep that row.

Where tokens have several experts, there may be one such output for each slot, to be summed afterwards. Each is
rewritten on its own, weighted inside or outside:

    for k in range(K):
        y = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            m = ids[:, k] == e
            y[m] = expert(x[m])                          # or y.index_copy_(0, tokens, ...), y.index_put((tokens,), ...)
        out = out + y * weights[:, k, None]              # or y[m] = expert(x[m]) * weights[m, k, None]
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from fx_passes.facts.ids import is_single_choice
from fx_passes.facts.masks import column_of_ids
from fx_passes.facts.statements import Mask
from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.forms.range_loop import number_of_experts
from fx_passes.region import LoopRegion

NAME = "assignment"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if not loop.is_over_hits and loop.assigns and not loop.is_flat)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    region = region_of(NAME, loop, masks, number_of_experts(loop, masks))
    column = None if is_single_choice(region.ids_TK) else _column(loop, masks)
    return region if column is None else replace(region, ids_TK=column, top_k=1, slot=masks[0].slot)


def _column(loop: Loop, masks: tuple[Mask, ...]) -> fx.Node | None:
    """`ids[:, k]`, where all masks are of that slot alone."""
    slot = masks[0].slot
    if slot is None or any(mask.slot != slot for mask in masks):
        return None
    stack, wanted = list(loop.found[0].token_nodes), (masks[0].ids, slot)
    while stack:
        node = stack.pop()
        if column_of_ids(node) == wanted:
            return node
        stack.extend(node.all_input_nodes)
    return None
