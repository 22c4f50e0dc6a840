"""An output of the full size for each expert, or for each choice, and their sum.

    outputs = []
    for e, expert in enumerate(experts):
        tokens, slots = torch.where(ids == e)
        y = torch.zeros_like(x)
        y[tokens] = expert(x[tokens]) * weights[tokens, slots, None]         # or y.index_add_(0, tokens, ...), y[mask]
        outputs.append(y)
    out = torch.stack(outputs).sum(0)                    # or sum(outputs), or out = out + y in the loop

One tensor may hold all of them, along its first dim or behind that of tokens:

    y = x.new_zeros(E, T, D)
    for e, expert in enumerate(experts):
        y[e, mask] = expert(x[mask]) * weight[mask]      # or y[mask, e] of zeros [T, E, D]
    out = y.sum(0)

So may the choices, `y[mask, k] = ...` with `mask = ids[:, k] == e`, for each k and e. All is zero but what experts
write. Where outputs are used otherwise than to add them up they stay, or are rewritten each on its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from fx_passes.dense.part_sums import PartSum, part_sums
from fx_passes.facts import chosen_tokens
from fx_passes.facts.ids import num_choices
from fx_passes.forms.accumulation import accumulations, closure
from fx_passes.forms.loop import Loop, mask_of, region_of
from fx_passes.graph.aliasing import made_by
from fx_passes.graph.ops import ZEROS, is_inplace, known_tensor, op_name
from fx_passes.region import Accumulation, LoopRegion, Rejected, SummedRegion
from fx_passes.rules.loop import is_contiguous

NAME = "summed_outputs"


@dataclass(frozen=True)
class Part:
    """One output: what `accumulations` write to fresh zeros, which hold several along `dim`."""

    start: fx.Node
    accumulations: tuple[Accumulation, ...]
    dim: int | None

    @property
    def tensor(self) -> fx.Node:
        """What is added up: in place the zeros, with what was written to them, by the first name or the last."""
        last = self.accumulations[-1].result
        return last if last.users or not is_inplace(last) else self.start


@dataclass(frozen=True)
class Summed:
    parts: tuple[Part, ...]
    total: PartSum

    @property
    def loop(self) -> Loop:
        """All that experts write, as one loop."""
        return Loop(self.parts[0].start, tuple(found for part in self.parts for found in part.accumulations))


def candidates(graph: fx.Graph) -> Iterator[Summed]:
    """Sums of several parts, by numbered experts of the same ids, of which none has the work of another."""
    parts = list(_parts(graph))
    dims = {part.start: {other.dim for other in parts if other.start is part.start} for part in parts}
    buffers = {start: dim for start, (dim, *others) in dims.items() if dim is not None and not others}
    whole = frozenset(part.tensor for part in parts if dims[part.start] == {None})
    for total in part_sums(graph, whole, buffers):
        own = tuple(part for part in parts if part.tensor in total.parts)
        masks = [mask_of(found) for part in own for found in part.accumulations]
        pairs = {(mask.expert, mask.slot) for mask in masks}
        is_numbered = all(isinstance(mask.expert, int) and mask.ids is masks[0].ids for mask in masks)
        if len(own) > 1 and is_numbered and len(pairs) == len(masks):
            yield Summed(own, total)


def _parts(graph: fx.Graph) -> Iterator[Part]:
    for (start, place), found in accumulations(graph).items():
        if op_name(made_by(start)) in ZEROS and all(chosen_tokens(own.tokens) is not None for own in found):
            yield Part(start, tuple(found), place[0] if place is not None else None)


def match(found: Summed) -> SummedRegion:
    loop, total = found.loop, found.total
    masks = tuple(map(mask_of, loop.found))
    pairs = {(mask.expert, mask.slot) for mask in masks}
    count = len({mask.expert for mask in masks})
    slots = range(num_choices(masks[0].ids)) if loop.is_by_slot else (None,)
    if pairs != {(expert, slot) for expert in range(count) for slot in slots}:
        detail = f"outputs of {len(pairs)} pairs of expert and choice are summed, which are not all"
        raise Rejected("every_expert_is_covered", total.result, detail)
    whole = region_of(NAME, loop, masks, count)
    if not is_contiguous(known_tensor(total.result), whole.token_dims + 1):
        raise Rejected("accumulator_may_be_added_to", total.result, "the sum is not contiguous, or has other dims")
    results = {own.result for own in loop.found}
    starts = {part.start for part in found.parts}.union(total.nodes)
    inner = whole.inner | closure({*starts, *results}, frozenset((total.result,))) | {total.result}
    if total.rest in inner:
        detail = "what the outputs are added to is computed from one of them"
        raise Rejected("no_intermediate_escapes", total.rest, detail)
    writes = whole.writes.union(filter(is_inplace, total.nodes))
    whole = replace(whole, inner=inner, writes=writes, is_part=True, accumulations=())
    return SummedRegion(
        form=NAME,
        ids_TK=whole.ids_TK,
        top_k=whole.top_k,
        num_experts=count,
        body=whole.body,
        routing=whole.routing,
        inner=inner,
        result=total.result,
        output=known_tensor(total.result),
        writes=writes,
        deviations=whole.deviations,
        token_dims=whole.token_dims,
        addend=total.rest,
        parts=tuple(_part_of(whole, part, found) for part in found.parts),
    )


def _part_of(whole: LoopRegion, part: Part, found: Summed) -> LoopRegion:
    """What adds this part, or several, belongs to its writes: it may run only if the expert has a token."""
    tensors = {other.tensor for other in found.parts} - {part.tensor}
    adding = [
        node
        for node in found.total.nodes
        if part.tensor in node.all_input_nodes or tensors.isdisjoint(node.all_input_nodes)
    ]
    accumulations = tuple(replace(own, nodes=(*own.nodes, *adding)) for own in part.accumulations)
    return replace(
        whole,
        accumulator=part.start,
        accumulations=accumulations,
        masks=tuple(map(mask_of, accumulations)),
        result=accumulations[-1].result,
        base=None,
    )
