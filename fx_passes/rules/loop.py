"""What must hold of a loop over experts, beside the rules for every region: how it adds, what an iteration hands on.

T tokens, K experts per token, E experts.
"""

import math
from collections.abc import Callable

import torch
from torch import fx

from fx_passes.capture import Guard, guards_of
from fx_passes.facts import chosen
from fx_passes.facts.ids import ids_are_distinct, is_single_choice
from fx_passes.facts.statements import Mask
from fx_passes.graph.aliasing import allocates, made_by, writers_of
from fx_passes.graph.ops import EMPTY, ZEROS, fake_tensor, is_cast_alike, is_inplace, op_name, same_size, sizes_of
from fx_passes.region import Accumulation, LoopRegion, Rejected


def assignments_overwrite_nothing(region: LoopRegion) -> None:
    """`out[tokens] = v` keeps the last expert's rows: fine only where a token has one expert, or a row for each.

    Of several outputs that are summed, each may have the rows of one expert alone, or of one slot.
    """
    assigning = [accumulation for accumulation in region.accumulations if accumulation.assigns]
    if not assigning or _is_flat(region) or (region.is_part and _are_of_other_tokens(region.masks)):
        return
    if len(assigning) != len(region.accumulations) or not is_single_choice(region.ids_TK):
        raise Rejected(
            "assignments_overwrite_nothing",
            assigning[0].result,
            "rows are assigned to tokens that have several experts",
        )


def _are_of_other_tokens(masks: tuple[Mask, ...]) -> bool:
    """Whether no token is chosen by two of these masks of different experts or slots."""
    slots = {mask.slot for mask in masks}
    return len(masks) == 1 or (len(slots) == 1 and None not in slots)


def _is_flat(region: LoopRegion) -> bool:
    """Whether each expert writes the rows of its slots, not those of its tokens."""
    rows = [chosen(accumulation.tokens) for accumulation in region.accumulations]
    return all(found is not None and found[1] == "N" for found in rows)


def accumulator_may_be_added_to(region: LoopRegion) -> None:
    """Or as what the sum is added to, be it not added to in place or a tensor of its own.

    Where rows are assigned, tokens without an expert keep those of such a tensor.
    """
    start = made_by(region.accumulator)
    if start.kwargs.get("requires_grad", False):
        raise Rejected("accumulator_may_be_added_to", start, "the output is a leaf that requires gradients")
    own, dims = len(sizes_of(region.accumulator)), _dims_of_output(region)
    if not region.is_part and own != dims:
        detail = f"the output has {own} dims, where tokens with a row of features each have {dims}"
        raise Rejected("accumulator_may_be_added_to", start, detail)
    if not region.is_part and not is_contiguous(fake_tensor(region.accumulator), dims):
        raise Rejected("accumulator_may_be_added_to", start, "the output is not contiguous")
    if region.base is None and region.addend is None and _is_written_before(region):
        raise Rejected("accumulator_may_be_added_to", start, "the output is written to before the loop adds to it")
    if region.base is not None and allocates(start):
        return
    if region.addend is not None and (not is_inplace(region.anchor) or _may_be_added_to(start)):
        return
    allowed = ZEROS | EMPTY if all(found.assigns for found in region.accumulations) else ZEROS
    if op_name(start) not in allowed or is_inplace(start):
        raise Rejected("accumulator_may_be_added_to", start, "the loop adds to what others may read or write")


def _is_written_before(region: LoopRegion) -> bool:
    """By others than the loop, so that it is blank no longer."""
    return any(writer < region.result for writer in set(writers_of(region.accumulator)) - region.writes)


def _may_be_added_to(start: fx.Node) -> bool:
    """Whether it has memory of its own, and no derivative reads it: eager raises where one does."""
    return allocates(start) and op_name(start) in _DERIVED_FROM_OPERANDS


_DERIVED_FROM_OPERANDS = frozenset("linear matmul mm bmm add sub mul clone index_add".split())


def _dims_of_output(region: LoopRegion) -> int:
    """As many as count tokens, and one for features; rows of slots may be counted by two."""
    own = len(sizes_of(region.accumulator))
    return own if _is_flat(region) and own == 3 else region.token_dims + 1


def is_contiguous(tensor: torch.Tensor | None, dims: int) -> bool:
    if tensor is None or tensor.dim() != dims:
        return False
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(dims)]
    return all(map(same_size, tensor.stride(), strides))


def accumulator_is_not_read_inside(region: LoopRegion) -> None:
    """Until the last addition only additions touch the output. Shape and dtype may be asked for: they don't change.

    What the sum starts from stays as it was where it is not added to in place, and may be read. But in an iteration
    that stands for all it is what the iterations before have added up.
    """
    places = region.places()
    last, own = places[region.result], region.writes | region.earlier
    read_from = dict.fromkeys(region.holders, 0)
    if region.symbol is not None:
        read_from.setdefault(region.accumulator, places[region.symbol])
    for output, first in read_from.items():
        for user in output.users:
            if first <= places[user] < last and user not in own and not asks_for_metadata(user, output):
                raise Rejected("accumulator_is_not_read_inside", user, "the output is used before the loop has ended")


_METADATA = frozenset("size dim numel stride new_zeros new_empty zeros_like empty_like ones_like full_like".split())


def asks_for_metadata(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether `node` reads sizes or the dtype of `tensor` alone."""
    casts = is_cast_alike(node) and node.args[0] is not tensor
    return casts or node.target is torch.ops.aten.sym_size.int or op_name(node) in _METADATA


def additions_follow_each_other(region: LoopRegion) -> None:
    """Each addition goes on from the one before it; one in place may name the output by its first name."""
    before = region.accumulator
    for accumulation in region.accumulations:
        in_place = is_inplace(accumulation.result)
        if in_place is not is_inplace(region.anchor):
            raise Rejected("additions_follow_each_other", accumulation.result, "some additions are in place, not all")
        if accumulation.accumulator is not before and not (in_place and accumulation.accumulator in region.outputs):
            raise Rejected(
                "additions_follow_each_other", accumulation.result, "an addition starts from an older output"
            )
        before = accumulation.result if not in_place else before
    if region.symbol is not None and not is_inplace(region.result):
        carried = region.symbol.meta.get("scatter_moe_carried", ())
        if (region.accumulator, region.result) not in carried:
            raise Rejected("additions_follow_each_other", region.result, "each iteration starts from the first output")


def repeated_ids_are_counted(region: LoopRegion) -> None:
    """`out[tokens] += v` keeps one of two equal tokens: fine only where a token's ids are distinct, as topk's are.

    So is a mask that holds where any slot of the token is the expert's.
    """
    pairs = zip(region.accumulations, region.masks, strict=True)
    if (
        is_single_choice(region.ids_TK)
        or _is_flat(region)
        or all(_counts_all(accumulation, mask) for accumulation, mask in pairs)
    ):
        return
    if not ids_are_distinct(region.ids_TK):
        raise Rejected(
            "repeated_ids_are_counted",
            region.anchor,
            "a token's rows are added once, whatever its number of slots with the expert, and its ids may repeat",
        )


def _counts_all(accumulation: Accumulation, mask: Mask) -> bool:
    return not mask.reduced and (accumulation.counts_duplicates or mask.slot is not None)


def guards_are_of_the_same_expert(region: LoopRegion) -> None:
    """What runs only if an expert has a token is that expert's own work."""
    for accumulation, mask in zip(region.accumulations, region.masks, strict=True):
        for node in accumulation.nodes:
            if not all(_is_about(mask, guard) for guard in guards_of(node)):
                raise Rejected(
                    "guards_are_of_the_same_expert",
                    node,
                    "an expert's work depends on whether another expert has a token",
                )


def _is_about(mask: Mask, guard: Guard) -> bool:
    """Whether what is guarded does nothing anyway where the guard is false."""
    return (guard.ids, guard.expert) == (mask.ids, mask.expert) and guard.slot in (None, mask.slot)


def carried_tensors_are_the_output(region: LoopRegion) -> None:
    """Where one iteration stands for all, the only tensor that an iteration hands to the next is the output."""
    if region.symbol is None:
        return
    for before, after in region.symbol.meta.get("scatter_moe_carried", ()):
        is_output = before is region.accumulations[0].accumulator and after is region.result
        if before is not None and not is_output:
            raise Rejected(
                "carried_tensors_are_the_output", after, f"`{after.name}` is handed from one iteration to the next"
            )


LOOP_RULES: tuple[Callable[[LoopRegion], None], ...] = (
    assignments_overwrite_nothing,
    accumulator_may_be_added_to,
    accumulator_is_not_read_inside,
    guards_are_of_the_same_expert,
    carried_tensors_are_the_output,
    additions_follow_each_other,
    repeated_ids_are_counted,
)
