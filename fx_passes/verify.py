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

from fx_passes.body import Gathered, Op, PerExpert, SlotGathered
from fx_passes.loop_rules import LOOP_RULES
from fx_passes.ops import fake_tensor, is_inplace, known_tensor, op_name
from fx_passes.region import LoopRegion, MoERegion, Rejected
from fx_passes.row_wise import check_rows

_VIEWS = frozenset(
    """
    view reshape permute transpose t getitem select squeeze unsqueeze chunk split unbind expand expand_as contiguous
    to detach flatten narrow float half bfloat16 view_as swapaxes movedim
    """.split()
)


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
    ids = known_tensor(region.ids_TK)
    for value in region.body.of(Gathered):
        _require_size(value.source, ids.shape[:1], value.node)
    for value in region.body.of(SlotGathered):
        sizes = torch.Size((*ids.shape[:1], region.num_experts)) if value.table else ids.shape
        _require_size(value.source, sizes, value.node)
    rows, sizes = fake_tensor(region.body.root.node), region.output.shape
    if len(sizes) != 2 or not _is_same(sizes[0], ids.shape[0]) or rows is None or sizes[1:] != rows.shape[1:]:
        raise Rejected(
            "rows_belong_to_tokens", region.anchor, "the output is not of shape [tokens, width of the experts' rows]"
        )


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
        if len({(tensor.shape, tensor.dtype, tensor.device, tensor.stride()) for tensor in tensors}) != 1:
            raise Rejected(
                "experts_have_their_own_parameters",
                parameter.node,
                "the experts' parameters differ in shape, dtype, device or layout",
            )
        if parameter.stacked is not None and not _is_same(tensors[0].shape[0], region.num_experts):
            raise Rejected(
                "every_expert_is_covered",
                parameter.node,
                f"weights of another number of experts than the {region.num_experts} that are routed to",
            )
        if parameter.tensors and len(set(parameter.tensors)) != len(parameter.tensors):
            raise Rejected("experts_have_their_own_parameters", parameter.node, "two experts share a parameter")


def _is_plain(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return tensor is not None and not is_traceable_wrapper_subclass(tensor)


def no_intermediate_escapes(region: MoERegion) -> None:
    """What is computed from an expert's rows ends in the output, or in a check that dies with the region."""
    inside = set(region.inner)
    needed = _ancestors(region, inside)
    for node in inside - needed:
        if not _is_dead_end(node, inside, {}):
            seen = next((source for source in node.all_input_nodes if source in needed - {region.result}), node)
            raise Rejected("no_intermediate_escapes", seen, f"`{seen.name}` is used outside the experts")
    for node in needed - {region.result}:
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
    """Nothing outside sees `node`: it is pure, or an assertion on a size, and so is all that uses it."""
    if node not in known:
        known[node] = True
        harmless = node.op != "output" and not is_inplace(node) and (fake_tensor(node) is None or not node.is_impure())
        known[node] = harmless and node in inside and all(_is_dead_end(user, inside, known) for user in node.users)
    return known[node]


def nothing_is_written_inside(region: MoERegion) -> None:
    """From the routing's first node to the result nothing that the region reads is written, save by itself."""
    places, own = region.places(), region.writes
    first = min(places[node] for node in region.routing)
    read = {_storage(node) for node in _outer_inputs(region)}
    for node, place in places.items():
        if first < place < places[region.result] and node not in own and is_inplace(node):
            target = _storage(node)
            if target in read or target in region.inner:
                raise Rejected(
                    "nothing_is_written_inside", node, f"`{op_name(node)}` writes to something that the experts read"
                )


def _outer_inputs(region: MoERegion) -> Iterator[fx.Node]:
    yield region.ids_TK
    yield from region.routing
    own = region.inner.union(region.outputs)
    for node in region.inner:
        yield from (source for source in node.all_input_nodes if source not in own)


def _storage(node: fx.Node) -> fx.Node:
    """The node whose storage `node` may alias."""
    while node.all_input_nodes and (op_name(node) in _VIEWS or is_inplace(node)):
        node = node.all_input_nodes[0]
    return node


def grad_mode_is_constant(region: MoERegion) -> None:
    """All that is differentiable in the region, its result too, is recorded for backward, or none of it."""
    enabled = torch.is_grad_enabled()
    modes = set()
    for node in region.graph.nodes:
        if switches_grad_mode(node):
            enabled = bool(node.args[0])
        elif node in region.inner and _is_differentiable(node):
            modes.add(enabled)
        if len(modes) > 1:
            raise Rejected("grad_mode_is_constant", node, "grad mode changes inside the region")


def autocast_is_constant(region: MoERegion) -> None:
    """Autocast doesn't change between the first differentiable node of the region and its result."""
    places = region.places()
    start = min(places[node] for node in region.inner if _is_differentiable(node))
    for node, place in places.items():
        if start < place < places[region.result] and _switches_autocast(node):
            raise Rejected("autocast_is_constant", node, "autocast or inference mode changes inside the region")


def products_keep_their_dtype(region: MoERegion) -> None:
    """Autocast leaves `grouped_mm` alone and casts what our ops read: it must be off, or of the rows' dtype."""
    for op in region.body.of(Op):
        product = op.node.args[0] if is_inplace(op.node) else op.node
        tensor = fake_tensor(product)
        if op_name(product) == "grouped_mm" and tensor is not None:
            dtype = _autocast_dtype(product, tensor.device.type)
            if dtype not in (None, tensor.dtype):
                raise Rejected("products_keep_their_dtype", product, f"autocast to {dtype} would reach the products")


def _autocast_dtype(node: fx.Node, device_type: str) -> torch.dtype | None:
    """What autocast casts to where `node` stands; None where it is off."""
    ambient = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    entered: dict[fx.Node, torch.dtype | None] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is torch.amp.autocast_mode._enter_autocast and other.args[0] == device_type:
            _, dtype, enabled, _ = other.args
            entered[other] = (dtype or torch.get_autocast_dtype(device_type)) if enabled else None
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(other.args[0], None)
    return list(entered.values())[-1] if entered else ambient


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


RULES: tuple[Callable[[MoERegion], None], ...] = (
    dtypes_are_those_of_a_layer,
    rows_belong_to_tokens,
    experts_have_their_own_parameters,
    no_intermediate_escapes,
    nothing_is_written_inside,
    grad_mode_is_constant,
    autocast_is_constant,
    products_keep_their_dtype,
    body_is_row_wise,
)
