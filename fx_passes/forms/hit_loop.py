"""A loop over the experts that have a token, with the experts' weights stacked.

    hit = (mask.sum(dim=(-1, -2)) > 0).nonzero()         # mask = one_hot(ids, E or E + 1).permute(2, 1, 0)
    for e in hit:
        e = e[0]
        if e == E: continue                              # sentinel: ids of tokens that belong to another rank
        slots, tokens = torch.where(mask[e])
        out.index_add_(0, tokens, expert(x[tokens], up[e], down[e]) * weights[tokens, slots, None])

It is captured as one iteration over a symbolic expert, whatever the number of experts. The experts may be listed in
other ways, `for (e,) in hit`, `for i, e in enumerate(hit)` where `i` is not read, `torch.where(counts > 0)[0]`,
`ids.unique()`. As numbers, `hit.flatten().tolist()`,
`ids.unique().tolist()`, `set(ids.flatten().tolist())`, they have an iteration each, and the loop is one of the form
"range_loop"; so is one where experts compute weights of their parameters, `W[e] + scale * B[e] @ A[e]`.
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.facts import fact
from fx_passes.facts.ids import classes_that_occur
from fx_passes.facts.statements import Hit
from fx_passes.forms.loop import Loop, loops, masks_of, region_of
from fx_passes.region import LoopRegion, Rejected

NAME = "hit_loop"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    return (loop for loop in loops(graph) if loop.is_over_hits)


def match(loop: Loop) -> LoopRegion:
    found, symbol, masks = loop.found, loop.symbol, masks_of(loop)
    assert symbol is not None
    if len(found) != 1:
        raise Rejected(
            "every_expert_is_covered", found[0].result, "the loop adds to its output more than once an iteration"
        )
    hit = fact(symbol.args[0])
    if not isinstance(hit, Hit) or hit.ids is not masks[0].ids or hit.slot not in (None, masks[0].slot):
        raise Rejected(
            "every_expert_is_covered", symbol, "the list of hit experts was made from other ids than the mask"
        )
    classes = [c for c in range(hit.num_classes) if not _is_excluded(c, symbol)]
    if classes != list(range(len(classes))):
        raise Rejected("every_expert_is_covered", symbol, "the loop skips an expert that is not the last")
    return region_of(NAME, loop, masks, classes_that_occur(masks[0].ids, len(classes)))


def _is_excluded(number: int, symbol: fx.Node) -> bool:
    excluded = symbol.meta.get("scatter_moe_excluded", {})
    return any(number == other if how == "eq" else number >= other for other, how in excluded.items())
