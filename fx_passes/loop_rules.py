"""What must hold of a loop over experts, beside the rules for every region: how it adds, what an iteration hands on.

T tokens, K experts per token, E experts.
"""

from collections.abc import Callable

import torch
from torch import fx

from fx_passes.aliasing import storage_of, writers_of
from fx_passes.capture import guards_of
from fx_passes.ops import arg, fake_tensor, is_inplace, op_name, same_size
from fx_passes.region import LoopRegion, Rejected

_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
_PRESERVES_VALUES = frozenset("view reshape to long int contiguous detach squeeze unsqueeze flatten clone".split())


def accumulator_starts_as_zeros(region: LoopRegion) -> None:
    if op_name(region.accumulator) not in _ZEROS or is_inplace(region.accumulator):
        raise Rejected("accumulator_starts_as_zeros", region.accumulator, "the loop does not add to fresh zeros")
    if region.accumulator.kwargs.get("requires_grad", False):
        raise Rejected(
            "accumulator_starts_as_zeros", region.accumulator, "the output is a leaf that requires gradients"
        )
    if not _is_contiguous(fake_tensor(region.accumulator)):
        raise Rejected("accumulator_starts_as_zeros", region.accumulator, "the output is not a contiguous matrix")


def _is_contiguous(tensor: torch.Tensor | None) -> bool:
    if tensor is None or tensor.dim() != 2:
        return False
    return all(map(same_size, tensor.stride(), (tensor.shape[1], 1)))


def accumulator_is_not_read_inside(region: LoopRegion) -> None:
    """Until the last addition only additions touch the output. Shape and dtype may be asked for: they don't change."""
    places = region.places()
    last, own = places[region.result], region.writes
    for output in region.outputs:
        for user in output.users:
            if places[user] < last and user not in own and not _asks_for_metadata(user):
                raise Rejected("accumulator_is_not_read_inside", user, "the output is used before the loop has ended")


def _asks_for_metadata(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int or op_name(node) in ("size", "dim", "numel", "stride")


def additions_follow_each_other(region: LoopRegion) -> None:
    """Each addition goes on from the one before it; one in place may name the output by its first name."""
    before = region.accumulator
    for accumulation in region.accumulations:
        in_place = is_inplace(accumulation.result)
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
    """`out[tokens] += v` keeps one of two equal tokens: fine only where a token's ids are distinct, as topk's are."""
    if all(accumulation.counts_duplicates for accumulation in region.accumulations) or _single_choice(region.ids_TK):
        return
    if not ids_are_distinct(region.ids_TK) or any(writers_of(storage_of(region.ids_TK))):
        raise Rejected(
            "repeated_ids_are_counted",
            region.anchor,
            "`+=` at repeated tokens adds once, and the ids of a token may repeat",
        )


def _single_choice(ids: fx.Node) -> bool:
    tensor = fake_tensor(ids)
    return tensor is not None and (tensor.dim() == 1 or tensor.shape[1] == 1)


def ids_are_distinct(node: fx.Node) -> bool:
    """Whether `node` holds the indices of a topk over the last dim, through value-preserving operations only."""
    name = op_name(node)
    source = arg(node, 0, "input")
    if name == "getitem" and op_name(source) in ("topk", "sort") and node.args[1] == 1:
        tensor = fake_tensor(arg(source, 0, "input"))
        dim = arg(source, 2 if op_name(source) == "topk" else 1, "dim", -1)
        return tensor is not None and tensor.dim() == 2 and dim in (-1, 1)
    if name == "getitem" and _keeps_columns(node.args[1]):
        return ids_are_distinct(source)
    if name in _PRESERVES_VALUES and _keeps_rows(node):
        return ids_are_distinct(source)
    if name == "argsort":
        return arg(node, 1, "dim", -1) in (-1, 1)
    return False


def _keeps_columns(index: object) -> bool:
    return isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], slice)


def _keeps_rows(node: fx.Node) -> bool:
    before, after = fake_tensor(node.args[0]), fake_tensor(node)
    if op_name(node) in ("to", "long", "int"):
        return after is not None and after.dtype in (torch.int32, torch.int64)
    return (
        before is not None and after is not None and before.dim() == after.dim() and before.shape[-1] == after.shape[-1]
    )


def guards_are_of_the_same_expert(region: LoopRegion) -> None:
    """What runs only if an expert has a token is that expert's own work."""
    for accumulation, mask in zip(region.accumulations, region.masks, strict=True):
        for node in accumulation.nodes:
            if any(ids is not mask.ids or expert != mask.expert for ids, expert in guards_of(node)):
                raise Rejected(
                    "guards_are_of_the_same_expert",
                    node,
                    "an expert's work depends on whether another expert has a token",
                )


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
    accumulator_starts_as_zeros,
    accumulator_is_not_read_inside,
    guards_are_of_the_same_expert,
    carried_tensors_are_the_output,
    additions_follow_each_other,
    repeated_ids_are_counted,
)
