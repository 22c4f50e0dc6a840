"""When a rewrite is allowed: one function a rule, named as the sentence it proves. Each raises Rejected where it can't.

Near misses trace as cleanly as real loops do, so being recognised proves nothing. T tokens, K experts per token, E
experts, D model width.
"""

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fx_passes import autocast
from fx_passes.aliasing import storage_of, writers_of
from fx_passes.body import Gathered, PerExpert, SlotGathered, has_rows
from fx_passes.facts import fact, selected
from fx_passes.ids import ids_are_distinct
from fx_passes.loop_rules import LOOP_RULES
from fx_passes.ops import draws_random, example, fake_tensor, is_inplace, known_tensor, op_name, same_size, written
from fx_passes.region import GroupedRegion, LoopRegion, MoERegion, Rejected
from fx_passes.row_wise import check_rows
from fx_passes.statements import Counts, Hit, Listed


def verify(region: MoERegion) -> None:
    """All rules on `region`, for a loop also those of loops; raises Rejected at the first that doesn't hold."""
    for rule in LOOP_RULES if isinstance(region, LoopRegion) else ():
        rule(region)
    for rule in RULES:
        rule(region)


def body_is_row_wise(region: MoERegion) -> None:
    check_rows(region.body)


def rows_belong_to_tokens(region: MoERegion) -> None:
    """What is gathered by token has T rows, what is gathered by slot has the shape of ids, the output has T rows."""
    rows, sizes, count = fake_tensor(region.body.root.node), region.output.shape, region.token_dims
    if len(sizes) != count + 1 or rows is None or sizes[count:] != rows.shape[1:]:
        raise Rejected(
            "rows_belong_to_tokens", region.anchor, "the output is not of shape [tokens, width of the experts' rows]"
        )
    tokens = sizes[:count]
    by_slot = (torch.Size((*tokens, region.top_k)), torch.Size((sizes[0] * region.top_k,)))
    if isinstance(region, GroupedRegion):
        by_slot = (torch.Size((*tokens, 1)), tokens)
        if not same_size(known_tensor(region.ids_TK).numel(), sizes[0]):
            raise Rejected("rows_belong_to_tokens", region.anchor, "not as many rows as slots")
    else:
        _require_size(region.ids_TK, by_slot[known_tensor(region.ids_TK).dim() == 1], region.ids_TK, count)
    for value in region.body.of(Gathered):
        _require_size(value.source, tokens, value.node)
    for value in region.body.of(SlotGathered):
        flat = known_tensor(value.source).dim() == 1
        _require_size(
            value.source, torch.Size((*tokens, region.num_experts)) if value.table else by_slot[flat], value.node
        )


def _require_size(node: fx.Node, sizes: torch.Size, at: fx.Node, token_dims: int = 0) -> None:
    """Raises Rejected where `node` has other sizes; its tokens may stand in more than `token_dims` dims, if told."""
    tensor = fake_tensor(node)
    if tensor is not None and tensor.dim() > token_dims + 1 > 1:
        tensor = tensor.flatten(0, tensor.dim() - 1 - token_dims)
    if (
        tensor is None
        or tensor.dim() < len(sizes)
        or not all(same_size(a, b) for a, b in zip(tensor.shape, sizes, strict=False))
    ):
        shape = None if tensor is None else tuple(tensor.shape)
        raise Rejected("rows_belong_to_tokens", at, f"`{node.name}` has shape {shape}, the ids have {tuple(sizes)}")


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


def no_intermediate_escapes(region: MoERegion) -> None:
    """What is computed from an expert's rows ends in the output, or in a check that dies with the region."""
    inside = set(region.inner)
    needed = _ancestors(region, inside)
    known: dict[fx.Node, bool] = {}
    for node in sorted(inside - needed):
        if not _is_dead_end(node, inside, known):
            seen = next((source for source in node.all_input_nodes if source in needed - {region.result}), node)
            raise Rejected("no_intermediate_escapes", seen, f"`{seen.name}` is used outside the experts")
    for node in sorted(needed - {region.result}):
        for user in node.users:
            if user not in inside:
                raise Rejected("no_intermediate_escapes", user, f"`{node.name}` is used outside the experts")


def _ancestors(region: MoERegion, inside: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the region that its writes and its result need."""
    seen: set[fx.Node] = set()
    stack = [node for node in region.writes if node is not region.result]
    stack += [source for node in {*region.writes, region.result} for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in inside and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen | {region.result}


def _is_dead_end(node: fx.Node, inside: set[fx.Node], known: dict[fx.Node, bool]) -> bool:
    """Nothing outside sees `node`: it has no effect, or is an assertion that always holds, and so are its users."""
    if node not in known:
        known[node] = True
        harmless = node.op != "output" and (_always_holds(node) or not _has_effect(node))
        known[node] = harmless and node in inside and all(_is_dead_end(user, inside, known) for user in node.users)
    return known[node]


def _has_effect(node: fx.Node) -> bool:
    return is_inplace(node) or draws_random(node) or node.is_impure()


def _always_holds(node: fx.Node) -> bool:
    """Dynamo's own assertions: an expert has at least no slot, and at most all; at most all experts are hit.

    Two selections of one expert's slots are equally long.
    """
    if node.target is not torch.ops.aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
        return False
    question = node.args[0]
    if len(question.args) != 2 or not _is_length(question.args[0]):
        return False
    if op_name(question) == "eq":
        return _are_as_many(question.args[0], question.args[1])
    bound = example(question.args[1]) if isinstance(question.args[1], fx.Node) else question.args[1]
    if op_name(question) == "ge":
        return type(bound) is int and bound <= _smallest_length(question.args[0])
    most = _largest_length(question.args[0])
    if op_name(question) != "le" or most is None or not isinstance(bound, (int, torch.SymInt)):
        return False
    return statically_known_true(bound >= most)


def _is_length(size: object) -> TypeGuard[fx.Node]:
    return isinstance(size, fx.Node) and size.target is torch.ops.aten.sym_size.int and size.args[1:] == (0,)


def _are_as_many(size: fx.Node, other: object) -> bool:
    if not _is_length(other):
        return False
    first, second = selected(size.args[0]), selected(other.args[0])
    if first is None or second is None or first.key != second.key:
        return False
    return first.reduced == second.reduced or ids_are_distinct(first.ids)


def _smallest_length(size: fx.Node) -> int:
    """`bincount` counts at least as many classes as it was asked for."""
    counts = fact(size.args[0])
    return counts.num_classes if isinstance(counts, Counts) and not counts.open_ended else 0


def _largest_length(size: fx.Node) -> int | torch.SymInt | None:
    """The largest value of `size`, where it is how many slots an expert has or how many experts are hit."""
    listed = fact(size.args[0])
    if isinstance(listed, Hit):
        return listed.num_classes
    if isinstance(listed, Listed):
        return known_tensor(listed.one_hot.ids).numel()
    mask = selected(size.args[0])
    if mask is None:
        return None
    ids = known_tensor(mask.ids)
    once_a_token = mask.reduced or mask.slot is not None or ids_are_distinct(mask.ids)
    return ids.shape[0] if once_a_token else ids.numel()


def nothing_is_written_inside(region: MoERegion) -> None:
    """From the routing's first node to the result nothing that the region reads is written, save by itself."""
    places, own = region.places(), region.writes
    first, last = min(places[node] for node in region.routing), places[region.result]
    writers = {writer for node in _outer_inputs(region) for writer in writers_of(storage_of(node))}
    writers |= {user for node in region.inner for user in node.users if node in written(user)}
    for node in sorted(writers - own, key=places.__getitem__):
        if first < places[node] < last:
            name = op_name(node) or node.target
            raise Rejected("nothing_is_written_inside", node, f"`{name}` writes to something that the experts read")


def gathered_tensors_stay_as_they_are(region: MoERegion) -> None:
    """Naive code keeps copies of rows for backward, the rewritten one what they are gathered from."""
    rows = fake_tensor(region.body.root.node)
    if rows is None or not rows.requires_grad:
        return
    places = region.places()
    for gathered in (*region.body.of(Gathered), *region.body.of(SlotGathered)):
        for node in writers_of(storage_of(gathered.source)):
            if places[node] > places[region.result]:
                raise Rejected(
                    "gathered_tensors_stay_as_they_are", node, f"`{gathered.source.name}` is written after the experts"
                )


def _outer_inputs(region: MoERegion) -> Iterator[fx.Node]:
    yield region.ids_TK
    yield from region.routing
    yield from (source for node in region.routing for source in node.all_input_nodes)
    yield from (node for parameter in region.body.of(PerExpert) for node in parameter.parameters)
    own = region.inner.union(region.outputs)
    for node in region.inner:
        yield from (source for source in node.all_input_nodes if source not in own)


def grad_mode_is_constant(region: MoERegion) -> None:
    """All that is differentiable in the region, its result too, is recorded for backward, or none of it.

    If none is, what it takes from outside may have been recorded.
    """
    enabled = torch.is_grad_enabled()
    modes: dict[tuple[bool, bool], fx.Node] = {}
    for node in region.graph.nodes:
        if switches_grad_mode(node):
            enabled = bool(node.args[0])
        elif (node in region.inner or node in region.body.nodes) and _is_differentiable(node):
            modes.setdefault((node in region.inner, enabled), node)
    recorded, inside = {mode for _, mode in modes}, {mode for is_inner, mode in modes if is_inner}
    if len(recorded) > 1 and inside != {False}:
        node = max(modes.values())
        raise Rejected("grad_mode_is_constant", node, "grad mode changes inside the region")


def autocast_is_constant(region: MoERegion) -> None:
    """Autocast doesn't change between the first differentiable node of the region and its result."""
    places = region.places()
    start = min(places[node] for node in region.inner if _is_differentiable(node))
    for node, place in places.items():
        if start < place < places[region.result] and _switches_autocast(node):
            raise Rejected("autocast_is_constant", node, "autocast or inference mode changes inside the region")


def products_keep_their_dtype(region: MoERegion) -> None:
    """Autocast leaves `grouped_mm` alone: it can be off for ours only where it does nothing else to the experts."""
    product = autocast.product_left_alone(region.body)
    if product is not None and not autocast.reaches_products_alone(region.body):
        raise Rejected("products_keep_their_dtype", product, "autocast would reach the products")


def _is_differentiable(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_floating_point()


def switches_grad_mode(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled


def _switches_autocast(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and any(word in name for word in ("autocast", "inference_mode"))


def dtypes_are_those_of_a_layer(region: MoERegion) -> None:
    """Expert rows are floating point, and so is the output that they are added to."""
    rows = fake_tensor(region.body.root.node)
    if rows is None or not rows.is_floating_point() or not region.output.is_floating_point():
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "rows or output are not floating point")
    if not has_rows(region.body.root):
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "what is added does not depend on the tokens")
    for gathered in (*region.body.of(Gathered), *region.body.of(SlotGathered)):
        source = known_tensor(gathered.source)
        if not source.is_floating_point() or source.dim() > 1 + region.token_dims:
            raise Rejected("dtypes_are_those_of_a_layer", gathered.node, "gathered rows are no floating point vectors")


def no_function_transform(region: MoERegion) -> None:
    """The ops have derivatives, but no rules for torch.func's transforms."""
    level = 0
    for node in region.graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += name.endswith("increment_nesting") - name.endswith("decrement_nesting")
        if node in region.inner and level > 0:
            raise Rejected("no_function_transform", node, "the experts run under a transform of torch.func")


RULES: tuple[Callable[[MoERegion], None], ...] = (
    no_function_transform,
    dtypes_are_those_of_a_layer,
    rows_belong_to_tokens,
    experts_have_their_own_parameters,
    no_intermediate_escapes,
    nothing_is_written_inside,
    gathered_tensors_stay_as_they_are,
    grad_mode_is_constant,
    autocast_is_constant,
    products_keep_their_dtype,
    body_is_row_wise,
)
