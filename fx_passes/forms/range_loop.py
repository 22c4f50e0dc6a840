"""A Python loop over the experts.

    for e in range(E):                                   # or: for e, expert in enumerate(experts)
        slots, tokens = torch.where(mask[e])             # mask = one_hot(ids, E).permute(2, 1, 0), or ids == e
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])

Dynamo unrolls it. A loop over the experts that were hit becomes the same where the experts are modules of their own.
Guards that skip an expert without tokens (`if mask.any():`, `if tokens.numel() == 0: continue`) are seen through.
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.region import LoopRegion, Rejected

NAME = "range_loop"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if loop.symbol is None)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    numbers = [mask.expert for mask in masks if isinstance(mask.expert, int)]
    if len(numbers) != len(masks):
        raise Rejected(
            "loop_has_a_known_form", loop.found[0].result, "rows are added by token, but not in one loop over experts"
        )
    if sorted(numbers) != list(range(len(numbers))):
        raise Rejected(
            "every_expert_is_covered",
            loop.found[0].result,
            f"the loop runs over {_brief(numbers)}, not over 0..E-1, each once",
        )
    return region_of(NAME, loop, masks, len(numbers))


def _brief(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"experts {shown}, ..." if len(numbers) > 8 else f"experts {shown}"
