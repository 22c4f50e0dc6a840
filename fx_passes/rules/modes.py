"""Modes that must not change within a region, and where they hold: grad mode, autocast, transforms of torch.func."""

from collections.abc import Iterator

import torch
from torch import fx
from torch.autograd import forward_ad, grad_mode

from fx_passes.graph import autocast
from fx_passes.graph.ops import fake_tensor, is_inplace, written
from fx_passes.region import LoopRegion, MoERegion, Rejected
from fx_passes.rules.escape import moved


def no_function_transform(region: MoERegion) -> None:
    """The ops have derivatives, but no rules for torch.func's transforms and none for forward mode."""
    if forward_ad._current_level >= 0:
        raise Rejected("no_function_transform", region.anchor, "the experts run in forward mode")
    level = 0
    for node in region.graph.nodes:
        name = getattr(node.target, "__name__", "")
        level += name.endswith(_BEGINS) - name.endswith(_ENDS)
        if node in region.inner and level > 0:
            raise Rejected("no_function_transform", node, "the experts run under a transform of torch.func")


_BEGINS, _ENDS = ("increment_nesting", "enter_dual_level"), ("decrement_nesting", "exit_dual_level")


def grad_mode_is_constant(region: MoERegion) -> None:
    """All that is differentiable in the region, its result too, is recorded for backward, or none of it.

    If none is, what it takes from outside may have been recorded, but for what it adds to in place: that keeps its
    history. The views and sums that bring the router's weights to where they stand count as well: rewritten code reads
    the weights themselves.
    """
    own = region.inner | region.body.nodes
    brought = {node for node in region.routing | moved(region) if _reads_what_requires_grad(node)}
    modes: dict[tuple[bool, bool], fx.Node] = {}
    for node, enabled in _grad_modes(region.graph):
        if (node in own or node in brought) and _is_differentiable(node):
            modes.setdefault((node in region.inner, enabled), node)
    recorded, inside = {mode for _, mode in modes}, {mode for is_inner, mode in modes if is_inner}
    if len(recorded) > 1 and inside != {False}:
        node = max(modes.values())
        raise Rejected("grad_mode_is_constant", node, "grad mode changes inside the region")
    if inside == {False} and _keeps_history(region):
        detail = "what is added to in place was recorded for backward, the additions are not"
        raise Rejected("grad_mode_is_constant", region.anchor, detail)


def _keeps_history(region: MoERegion) -> bool:
    """Whether the region writes to a tensor that requires a gradient."""
    starts = (region.addend, region.base if isinstance(region, LoopRegion) else None)
    tensors = map(fake_tensor, starts)
    return is_inplace(region.result) and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _grad_modes(graph: fx.Graph) -> Iterator[tuple[fx.Node, bool]]:
    """Each node, and whether what it computes is recorded for backward."""
    enabled, inference = torch.is_grad_enabled(), dict[fx.Node, bool]()
    for node in graph.nodes:
        if switches_grad_mode(node):
            enabled = bool(node.args[0])
        elif node.target is grad_mode._enter_inference_mode:
            inference[node] = bool(node.args[0])
        elif node.target is grad_mode._exit_inference_mode:
            inference.pop(node.args[0])
        yield node, enabled and not next(reversed(inference.values()), False)


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
    """`rows[order] = y` is no tensor itself: what it writes to is."""
    tensors = map(fake_tensor, (node, *written(node)))
    return any(tensor is not None and tensor.is_floating_point() for tensor in tensors)


def _reads_what_requires_grad(node: fx.Node) -> bool:
    operands = map(fake_tensor, node.all_input_nodes)
    return any(operand is not None and operand.requires_grad for operand in operands)


def switches_grad_mode(node: fx.Node) -> bool:
    return node.target is torch._C._set_grad_enabled


def _switches_autocast(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and any(word in name for word in ("autocast", "inference_mode"))
