"""A Python loop over the experts.

    for e in range(E):                                   # or: for e, expert in enumerate(experts)
        slots, tokens = torch.where(mask[e])             # mask = one_hot(ids, E).permute(2, 1, 0), or ids == e
        out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])

Experts at its end may have no parameters: `x[tokens] * weights[tokens, slots, None]` alone is an identity expert.

It is captured as one iteration over a symbolic expert where it runs over all experts and they are alike, and unrolled
otherwise. A loop over the experts that were hit becomes the same where the experts are modules that are not alike. It
may run over `range(first, last)`: the slots of other experts give zeros. Guards that skip an expert without tokens are
seen through: `if mask.any():`, `if tokens.numel() == 0: continue`, `if counts[e] == 0: continue` with
`counts = ids.flatten().bincount(minlength=E).tolist()`. Another side, `elif self.training:`, must be off by a flag of
the module.

What counts tokens may stand beside the experts: `usage[e] += len(tokens)` of a buffer, or `mask.sum()`,
`load.append(tokens.numel())` for a `torch.tensor(load)`. It is computed from the ids then.

The positions may be listed for all experts at once, `experts, slots, tokens = torch.where(mask)`, of which each picks
its own by `experts == e`. The mask may also hold where any slot of a token is the expert's, or of flat slots, of which
`slots // K` are tokens:

    m = (ids == e).any(-1)
    out[m] += expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]       # or gates[m, e, None]

The expert may be found again among the ids of its own tokens, `weights[m][ids[m] == e]`, or their masked sum.

All experts may be compared at once, `ids.unsqueeze(-1) == torch.arange(E)`: that is `one_hot(ids, E)`.

Of gates [T, E] that are zero outside the top-k, the mask may hold where they are not zero, or above a number:

    tokens = (gates[:, e] > 0).nonzero().squeeze(-1)
    out[tokens] += expert(x[tokens]) * gates[tokens, e, None]

An expert's weights may be modules of its own or any views of what all experts have: `W[e, :F]`, `W[e].chunk(2)`,
`W.unbind(0)[e]`, `W[e * F : (e + 1) * F]`. They may be computed in the loop of its own parameters alone, as a merged
LoRA is: `W[e] + scale * B[e] @ A[e]`.

Tokens may stay in two dims, a batch of sequences, with ids [B, S, K]: `m` is then [B, S], positions are `b, s, k`. So
they may with one choice each, ids [B, S].

Or the sorted slots, of which each expert has a segment:

    order = ids.flatten().argsort()
    tokens, start = order // K, 0
    for e, n in enumerate(counts):                       # or `end` from counts.cumsum(0), as numbers or by numpy
        own = tokens[start : start + n]                  # or out.scatter_add_(0, own[:, None].expand(-1, D), ...)
        out.index_add_(0, own, expert(x[own]) * weights.view(-1)[order[start : start + n], None])
        start += n

Where they end may be searched for: `torch.searchsorted(ids.flatten().sort().values, torch.arange(E), right=True)`.
"""

from collections.abc import Iterator

import torch
from torch import fx

from fx_passes.body.unify import NotIsomorphic, UnknownOperation, unify
from fx_passes.body.values import PerExpert, Shared
from fx_passes.facts.statements import Mask
from fx_passes.forms.loop import Loop, loops, mask_of, masks_of, region_of
from fx_passes.graph.aliasing import storage_of
from fx_passes.graph.markers import experts_of_each
from fx_passes.graph.ops import fake_tensor, is_inplace
from fx_passes.region import Accumulation, LoopRegion, Rejected

NAME = "range_loop"


def candidates(graph: fx.Graph) -> Iterator[Loop]:
    for loop in loops(graph):
        if not (loop.is_over_hits or loop.is_by_slot or loop.is_flat or loop.assigns):
            yield from _parts(loop)


def _parts(loop: Loop) -> Iterator[Loop]:
    """Experts at the end of a loop that have no parameters are a loop of their own, which goes on from the others' sum.

    That one comes last, which is rewritten first: then the loop over the others still stands as it was.
    """
    number = len(loop.found)
    while number > 0 and _adds_in_place(loop) and _has_no_parameters(loop.found[number - 1]):
        number -= 1
    with_parameters, without = loop.found[:number], loop.found[number:]
    if with_parameters and without:
        yield Loop(loop.accumulator, with_parameters)
        yield Loop(loop.accumulator, without, earlier=with_parameters)
    else:
        yield loop


def _adds_in_place(loop: Loop) -> bool:
    """Whether the output has one name alone."""
    return all(
        found.accumulator is loop.accumulator and is_inplace(found.result) and not found.result.users
        for found in loop.found
    )


def _has_no_parameters(accumulation: Accumulation) -> bool:
    """Of one expert alone it isn't known that what it reads of a parameter is its own part."""
    try:
        body = unify([accumulation.value], [mask_of(accumulation)])
    except (NotIsomorphic, UnknownOperation):
        return False
    shared = (fake_tensor(storage_of(value.node)) for value in body.of(Shared))
    return not any(body.of(PerExpert)) and not any(isinstance(tensor, torch.nn.Parameter) for tensor in shared)


def match(loop: Loop) -> LoopRegion:
    masks = masks_of(loop)
    return region_of(NAME, loop, masks, number_of_experts(loop, masks))


def number_of_experts(loop: Loop, masks: tuple[Mask, ...]) -> int:
    """The loop runs over consecutive experts, each once: as one iteration that stands for all, or unrolled."""
    number = experts_of_each(loop.symbol)
    if number is not None:
        if len(masks) != 1:
            detail = "the loop adds to its output more than once an iteration"
            raise Rejected("every_expert_is_covered", loop.found[0].result, detail)
        return number
    numbers = [mask.expert for mask in masks if isinstance(mask.expert, int)]
    if len(numbers) != len(masks):
        raise Rejected(
            "loop_has_a_known_form", loop.found[0].result, "rows are added by token, but not in one loop over experts"
        )
    first = min(numbers)
    if sorted(numbers) != list(range(first, first + len(numbers))):
        raise Rejected(
            "every_expert_is_covered",
            loop.found[0].result,
            f"the loop runs over {_brief(numbers)}, not over consecutive ones, each once",
        )
    return len(numbers)


def _brief(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"experts {shown}, ..." if len(numbers) > 8 else f"experts {shown}"
