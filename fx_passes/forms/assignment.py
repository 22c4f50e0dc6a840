"""Top-1 experts that assign the rows of their tokens.

    for e, expert in enumerate(experts):
        m = ids == e                                     # ids [T], or one_hot(ids, E)[:, e].bool()
        out[m] = expert(x[m]) * probs[m, None]

or `out.index_copy_(0, tokens, ...)`. All tokens may be listed first, and all experts run before the first row is
assigned: `out[tokens[e], :] = outputs[e]`. What counts the listed tokens, `torch.tensor([len(t) for t in tokens])`,
stays. `out` starts as zeros, as `empty_like(x)`, or as `x.clone()` or the like: tokens without an expert then keep
that row.
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.forms.range_loop import number_of_experts
from fx_passes.region import LoopRegion

NAME = "assignment"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if not loop.is_over_hits and loop.assigns and not loop.is_flat)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    return region_of(NAME, loop, masks, number_of_experts(loop, masks))
