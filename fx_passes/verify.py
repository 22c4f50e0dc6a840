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

from fx_passes.aliasing import storage_of, writers_of
from fx_passes.body import Gathered, PerExpert, SlotGathered, has_rows
from fx_passes.capture import guards_of
from fx_passes.facts import Hit, Rows, Selection, fact
from fx_passes.ops import arg, draws_random, example, fake_tensor, is_inplace, known_tensor, op_name, written
from fx_passes.region import MoERegion, Rejected
from fx_passes.row_wise import check_rows

_ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
_PRESERVES_VALUES = frozenset("view reshape to long int contiguous detach squeeze unsqueeze flatten clone".split())


def verify(region: MoERegion) -> None:
    """All rules on `region`; raises Rejected at the first that doesn't hold."""
    for rule in RULES:
        rule(region)


def body_is_row_wise(region: MoERegion) -> None:
    check_rows(region.body)


def rows_belong_to_tokens(region: MoERegion) -> None:
    """What is gathered by token has T rows, what is gathered by slot has the shape of ids, the output has T rows."""
    ids = known_tensor(region.ids_TK)
    for value in region.body.of(Gathered):
        _require_size(value.source, ids.shape[:1], value.node)
    for value in region.body.of(SlotGathered):
        sizes = torch.Size((*ids.shape[:1], region.num_experts)) if value.table else ids.shape
        _require_size(value.source, sizes, value.node)
    _require_size(region.accumulator, ids.shape[:1], region.accumulator)
    accumulator = fake_tensor(region.accumulator)
    if accumulator is None or accumulator.dim() != 2 or accumulator.shape[1:] != _value_shape(region)[1:]:
        raise Rejected(
            "rows_belong_to_tokens",
            region.accumulator,
            "the output is not of shape [tokens, width of the experts' rows]",
        )


def _value_shape(region: MoERegion) -> torch.Size:
    value = fake_tensor(region.accumulations[0].value)
    return value.shape if value is not None else torch.Size(())


def _require_size(node: fx.Node, sizes: torch.Size, at: fx.Node) -> None:
    tensor = fake_tensor(node)
    if (
        tensor is None
        or tensor.dim() < len(sizes)
        or not all(_is_same(a, b) for a, b in zip(tensor.shape, sizes, strict=False))
    ):
        shape = None if tensor is None else tuple(tensor.shape)
        raise Rejected("rows_belong_to_tokens", at, f"`{node.name}` has shape {shape}, the ids have {tuple(sizes)}")


def _is_same(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    return statically_known_true(left == right)


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
        if parameter.stacked is not None and not _is_same(tensors[0].shape[0], region.num_experts):
            raise Rejected(
                "every_expert_is_covered",
                parameter.node,
                f"weights of another number of experts than the {region.num_experts} of the loop",
            )
        if parameter.tensors and len(set(parameter.tensors)) != len(parameter.tensors):
            raise Rejected("experts_have_their_own_parameters", parameter.node, "two experts share a parameter")


def _is_laid_out_as(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    sizes = zip((*tensor.shape, *tensor.stride()), (*other.shape, *other.stride()), strict=False)
    same_kind = (tensor.dim(), tensor.dtype, tensor.device) == (other.dim(), other.dtype, other.device)
    return same_kind and all(_is_same(left, right) for left, right in sizes)


def _is_plain(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return tensor is not None and not is_traceable_wrapper_subclass(tensor)


def accumulator_starts_as_zeros(region: MoERegion) -> None:
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
    return all(map(_is_same, tensor.stride(), (tensor.shape[1], 1)))


def accumulator_is_not_read_inside(region: MoERegion) -> None:
    """Until the last addition only additions touch the output. Shape and dtype may be asked for: they don't change."""
    places = region.places()
    last, own = places[region.result], region.additions
    for output in region.outputs:
        for user in output.users:
            if places[user] < last and user not in own and not _asks_for_metadata(user):
                raise Rejected("accumulator_is_not_read_inside", user, "the output is used before the loop has ended")


def _asks_for_metadata(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int or op_name(node) in ("size", "dim", "numel", "stride")


def additions_follow_each_other(region: MoERegion) -> None:
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


def no_intermediate_escapes(region: MoERegion) -> None:
    """What is computed from an expert's rows ends in the output, or in a check that dies with the loop."""
    inside = set(region.inner)
    needed = _ancestors(region, inside)
    known: dict[fx.Node, bool] = {}
    for node in inside - needed:
        if not _is_dead_end(node, inside, known):
            raise Rejected("no_intermediate_escapes", node, f"`{node.name}` is used outside the loop")
    for node in needed - {region.result}:
        for user in node.users:
            if user not in inside:
                raise Rejected("no_intermediate_escapes", user, f"`{node.name}` is used outside the loop")


def _ancestors(region: MoERegion, inside: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the loop that the accumulations need."""
    seen: set[fx.Node] = set()
    stack = [node for node in region.additions if node is not region.result]
    stack += [source for node in region.additions for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in inside and node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen | {accumulation.result for accumulation in region.accumulations}


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
    """Dynamo's own assertions: an expert has at least no slot, and at most all; at most all experts are hit."""
    if node.target is not torch.ops.aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
        return False
    question = node.args[0]
    most = _largest_length(question.args[0]) if len(question.args) == 2 else None
    if most is None:
        return False
    bound = example(question.args[1]) if isinstance(question.args[1], fx.Node) else question.args[1]
    if op_name(question) == "ge":
        return type(bound) is int and bound <= 0
    return op_name(question) == "le" and isinstance(bound, (int, torch.SymInt)) and statically_known_true(bound >= most)


def _largest_length(size: object) -> int | torch.SymInt | None:
    """The largest value of `size`, where it is how many slots an expert has or how many experts are hit."""
    if not isinstance(size, fx.Node) or size.target is not torch.ops.aten.sym_size.int or size.args[1] != 0:
        return None
    listed = fact(size.args[0])
    if isinstance(listed, Hit):
        return listed.num_classes
    return known_tensor(listed.mask.ids).numel() if isinstance(listed, (Rows, Selection)) else None


def nothing_is_written_inside(region: MoERegion) -> None:
    """From the routing's first node to the last addition nothing that the loop reads is written, save the output."""
    places, own = region.places(), region.additions
    first, last = min(places[node] for node in region.routing()), places[region.result]
    writers = {writer for node in _outer_inputs(region) for writer in writers_of(storage_of(node))}
    writers |= {user for node in region.inner for user in node.users if node in written(user)}
    for node in sorted(writers - own, key=places.__getitem__):
        if first < places[node] < last:
            name = op_name(node) or node.target
            raise Rejected("nothing_is_written_inside", node, f"`{name}` writes to something that the loop reads")


def gathered_tensors_stay_as_they_are(region: MoERegion) -> None:
    """The loop keeps copies of rows for backward, the rewritten one what they are gathered from."""
    value = fake_tensor(region.accumulations[0].value)
    if value is None or not value.requires_grad:
        return
    places = region.places()
    for gathered in (*region.body.of(Gathered), *region.body.of(SlotGathered)):
        for node in writers_of(storage_of(gathered.source)):
            if places[node] > places[region.result]:
                raise Rejected(
                    "gathered_tensors_stay_as_they_are", node, f"`{gathered.source.name}` is written after the loop"
                )


def _outer_inputs(region: MoERegion) -> Iterator[fx.Node]:
    yield region.ids_TK
    yield from region.routing()
    for node in region.inner:
        yield from (
            source for source in node.all_input_nodes if source not in region.inner and source is not region.accumulator
        )


def grad_mode_is_constant(region: MoERegion) -> None:
    """All that is differentiable in the loop, its additions too, is recorded for backward, or none of it."""
    enabled = torch.is_grad_enabled()
    modes = set()
    for node in region.graph.nodes:
        if switches_grad_mode(node):
            enabled = bool(node.args[0])
        elif (node in region.inner or node in region.body.nodes) and _is_differentiable(node):
            modes.add(enabled)
        if len(modes) > 1:
            raise Rejected("grad_mode_is_constant", node, "grad mode changes inside the loop")


def autocast_is_constant(region: MoERegion) -> None:
    """Autocast doesn't change between the first differentiable node of the loop and its last addition."""
    places = region.places()
    start = min(places[node] for node in region.inner if _is_differentiable(node))
    for node, place in places.items():
        if start < place < places[region.result] and _switches_autocast(node):
            raise Rejected("autocast_is_constant", node, "autocast or inference mode changes inside the loop")


def _is_differentiable(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_floating_point()


def switches_grad_mode(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled


def _switches_autocast(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and any(word in name for word in ("autocast", "inference_mode"))


def repeated_ids_are_counted(region: MoERegion) -> None:
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


def guards_are_of_the_same_expert(region: MoERegion) -> None:
    """What runs only if an expert has a token is that expert's own work."""
    for accumulation, mask in zip(region.accumulations, region.masks, strict=True):
        for node in accumulation.nodes:
            if any(ids is not mask.ids or expert != mask.expert for ids, expert in guards_of(node)):
                raise Rejected(
                    "guards_are_of_the_same_expert",
                    node,
                    "an expert's work depends on whether another expert has a token",
                )


def carried_tensors_are_the_output(region: MoERegion) -> None:
    """Where one iteration stands for all, the only tensor that an iteration hands to the next is the output."""
    if region.symbol is None:
        return
    for before, after in region.symbol.meta.get("scatter_moe_carried", ()):
        is_output = before is region.accumulations[0].accumulator and after is region.result
        if before is not None and not is_output:
            raise Rejected(
                "carried_tensors_are_the_output", after, f"`{after.name}` is handed from one iteration to the next"
            )


def dtypes_are_those_of_a_layer(region: MoERegion) -> None:
    """Expert rows are floating point, and so is the output that they are added to."""
    output, value = example(region.accumulator), fake_tensor(region.accumulations[0].value)
    if value is None or not value.is_floating_point() or not output.is_floating_point():
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "rows or output are not floating point")
    if not has_rows(region.body.root):
        raise Rejected("dtypes_are_those_of_a_layer", region.anchor, "what is added does not depend on the tokens")
    for gathered in (*region.body.of(Gathered), *region.body.of(SlotGathered)):
        if not known_tensor(gathered.source).is_floating_point() or known_tensor(gathered.source).dim() > 2:
            raise Rejected("dtypes_are_those_of_a_layer", gathered.node, "gathered rows are no floating point vectors")


def no_function_transform(region: MoERegion) -> None:
    """The ops have derivatives, but no rules for torch.func's transforms."""
    level = 0
    for node in region.graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += name.endswith("increment_nesting") - name.endswith("decrement_nesting")
        if node in region.inner and level > 0:
            raise Rejected("no_function_transform", node, "the loop runs under a transform of torch.func")


RULES: tuple[Callable[[MoERegion], None], ...] = (
    dtypes_are_those_of_a_layer,
    rows_belong_to_tokens,
    experts_have_their_own_parameters,
    accumulator_starts_as_zeros,
    accumulator_is_not_read_inside,
    guards_are_of_the_same_expert,
    carried_tensors_are_the_output,
    additions_follow_each_other,
    no_intermediate_escapes,
    nothing_is_written_inside,
    gathered_tensors_stay_as_they_are,
    grad_mode_is_constant,
    autocast_is_constant,
    repeated_ids_are_counted,
    no_function_transform,
    body_is_row_wise,
)
