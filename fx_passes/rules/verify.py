"""When a rewrite is allowed: one function a rule, named as the sentence it proves. Each raises Rejected where it can't.

Near misses trace as cleanly as real loops do, so being recognised proves nothing. Here are the rules on shapes and
dtypes; those on modes, on what goes in and out and on loops have files of their own. T tokens, K experts per token, E
experts, D model width.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_passes.body.values import Gathered, PerExpert, SlotGathered, has_rows
from fx_passes.body.weighted_body import before_casts
from fx_passes.facts.ids import has_slots
from fx_passes.graph.ops import fake_tensor, known_tensor, same_size, same_sizes, sizes_of
from fx_passes.graph.said import said_of
from fx_passes.region import GroupedRegion, LoopRegion, MoERegion, Rejected, SummedRegion
from fx_passes.rules.escape import (
    no_intermediate_escapes,
    no_other_loop_holds_the_region,
    nothing_is_written_inside,
    tensors_for_backward_stay_as_they_are,
)
from fx_passes.rules.loop import LOOP_RULES
from fx_passes.rules.modes import (
    autocast_is_constant,
    grad_mode_is_constant,
    no_function_transform,
    products_keep_their_dtype,
)
from fx_passes.rules.row_wise import check_rows

Size = int | torch.SymInt


def verify(region: MoERegion) -> None:
    """All rules on `region`, for a loop also those of loops; raises Rejected at the first that doesn't hold."""
    loops = region.parts if isinstance(region, SummedRegion) else (region,)
    for loop in loops:
        for rule in LOOP_RULES if isinstance(loop, LoopRegion) else ():
            rule(loop)
    for rule in RULES:
        rule(region)


def body_is_row_wise(region: MoERegion) -> None:
    check_rows(region.body)


def dtypes_are_those_of_a_layer(region: MoERegion) -> None:
    """Expert rows are floating point, and so is the output that they are added to: float64 only if they are."""
    rows = fake_tensor(region.body.root.node)
    if rows is None or not rows.is_floating_point() or not region.output.is_floating_point():
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "rows or output are not floating point")
    computed = known_tensor(before_casts(region.body.root).node)
    if region.output.dtype == torch.float64 != computed.dtype:
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "the sum is float64, the experts' rows are not")
    if not has_rows(region.body.root):
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "what is added does not depend on the tokens")
    for gathered in (*region.body.of(Gathered), *region.body.of(SlotGathered)):
        source = known_tensor(gathered.source)
        is_vector = isinstance(gathered, SlotGathered) or source.dim() <= 1 + region.token_dims
        if not source.is_floating_point() or not is_vector:
            raise Rejected("dtypes_are_those_of_a_layer", gathered.node, "gathered rows are no floating point vectors")


def rows_belong_to_tokens(region: MoERegion) -> None:
    """What is gathered by token has T rows, what is gathered by slot has the shape of ids, the output has T rows."""
    rows, sizes, count = fake_tensor(region.body.root.node), region.output.shape, region.token_dims
    if len(sizes) != count + 1 or rows is None or sizes[count:] != rows.shape[1:]:
        raise Rejected(
            "rows_belong_to_tokens", region.anchor, "the output is not of shape [tokens, width of the experts' rows]"
        )
    tokens, choices = sizes[:count], region.top_k
    if isinstance(region, GroupedRegion):
        choices = 1
        if not same_size(known_tensor(region.ids_TK).numel(), sizes[0]):
            raise Rejected("rows_belong_to_tokens", region.anchor, "not as many rows as slots")
    else:
        ids = known_tensor(region.ids_TK)
        ids = ids if has_slots(region.ids_TK) or ids.dim() == 1 else ids.unsqueeze(-1)
        # Ids may have tokens in more dims than the output has.
        by_token = ids.flatten(0, -1 - count) if ids.dim() > count + 1 else ids
        _require_sizes(region.ids_TK, by_token.shape, tokens, (choices,), region.ids_TK)
    for value in region.body.of(Gathered):
        _require_sizes(value.source, sizes_of(value.source), tokens, (), value.node)
    for value in region.body.of(SlotGathered):
        columns, sizes = region.num_experts if value.table else choices, sizes_of(value.source)
        if region.slot is not None and not value.table:
            columns, sizes = 1, (*sizes[:-1], 1)
        if len(sizes) > count + 1:
            sizes = (math.prod(sizes[:-count]), *sizes[-count:])
        by_token = sizes[::-1] if value.experts_first else sizes
        _require_sizes(value.source, by_token, tokens, (columns,), value.node)


def _require_sizes(
    node: fx.Node, given: Sequence[Size], tokens: Sequence[Size], columns: tuple[Size, ...], at: fx.Node
) -> None:
    """Raises Rejected where the sizes of `node` don't begin with those of the tokens, in all their dims or in one, and
    of the columns. All may be in one dim, too, and there may be no dim of a single column.
    """
    if len(given) == 1:
        expected = (math.prod((*tokens, *columns)),)
    elif columns == (1,) and same_sizes(given, tokens):
        expected = tokens
    else:
        expected = (*tokens, *columns) if len(given) > len(tokens) else (math.prod(tokens), *columns)
    if not same_sizes(given[: len(expected)], expected):
        detail = f"{said_of(node)} has shape {tuple(given)}, the ids have {(*tokens, *columns)}"
        raise Rejected("rows_belong_to_tokens", at, detail)


def experts_have_their_own_parameters(region: MoERegion) -> None:
    """E parameters, no two the same, equal in shape, dtype, device and layout; plain tensors."""
    for parameter in region.body.of(PerExpert):
        tensors = [tensor for tensor in map(fake_tensor, parameter.parameters) if _is_plain(tensor)]
        if len(tensors) != len(parameter.parameters):
            raise Rejected(
                "experts_have_their_own_parameters", parameter.node, "an expert's parameter is a tensor subclass"
            )
        if not all(_is_laid_out_as(tensor, tensors[0]) for tensor in tensors):
            raise Rejected(
                "experts_have_their_own_parameters",
                parameter.node,
                "the experts' parameters differ in shape, dtype, device or layout",
            )
        if parameter.stacked is not None and not _has_all_experts(parameter.count, region):
            raise Rejected(
                "every_expert_is_covered",
                parameter.node,
                f"weights of another number of experts than the {region.num_experts} that are routed to",
            )
        if parameter.tensors and len(parameter.tensors) != region.num_experts:
            detail = f"{len(parameter.tensors)} experts have the parameter, {region.num_experts} are routed to"
            raise Rejected("every_expert_is_covered", parameter.node, detail)
        if parameter.tensors and len(set(parameter.tensors)) != len(parameter.tensors):
            raise Rejected("experts_have_their_own_parameters", parameter.node, "two experts share a parameter")


def _has_all_experts(count: int | torch.SymInt, region: MoERegion) -> bool:
    """A loop takes each expert's parameter by its number: there may be more of them."""
    if isinstance(region, LoopRegion):
        return statically_known_true(count >= region.first_expert + region.num_experts)
    return same_size(count, region.num_experts)


def _is_laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    sizes = zip((*tensor.shape, *tensor.stride()), (*other.shape, *other.stride()), strict=False)
    same_kind = (tensor.dim(), tensor.dtype, tensor.device) == (other.dim(), other.dtype, other.device)
    return same_kind and all(same_size(left, right) for left, right in sizes)


def _is_plain(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return tensor is not None and not is_traceable_wrapper_subclass(tensor)


RULES: tuple[Callable[[MoERegion], None], ...] = (
    no_function_transform,
    no_other_loop_holds_the_region,
    dtypes_are_those_of_a_layer,
    rows_belong_to_tokens,
    experts_have_their_own_parameters,
    no_intermediate_escapes,
    nothing_is_written_inside,
    tensors_for_backward_stay_as_they_are,
    grad_mode_is_constant,
    autocast_is_constant,
    products_keep_their_dtype,
    body_is_row_wise,
)
