"""Writes a verified region back into its graph as `torch.ops.scatter_moe.*`, then erases the naive code."""

from dataclasses import dataclass

from torch import fx

from fx_passes.body.mlp_body import match_mlp
from fx_passes.capture import events_of
from fx_passes.graph import autocast
from fx_passes.graph.ops import draws_random, known_tensor, written
from fx_passes.region import LoopRegion, MoERegion
from fx_passes.rewriting.emitter import Emitter
from fx_passes.rewriting.example_values import add_where_methods_are_called


@dataclass(frozen=True)
class Rewritten:
    """What a region became: the op, its activation, and the numbers of the events whose nodes were erased."""

    op: str
    activation: str
    erased_events: frozenset[int]


def rewrite(region: MoERegion) -> Rewritten:
    """Replaces `region` in its graph."""
    mlp = match_mlp(region.body)
    product = autocast.product_left_alone(region.body)
    with region.graph.inserting_before(region.result):
        entered = None
        if product is not None:
            entered = autocast.switched_off(region.graph, known_tensor(product).device.type)
        emitter = Emitter(region)
        output = emitter.mlp(mlp) if mlp is not None else emitter.general()
        if isinstance(region, LoopRegion) and region.base is not None:
            output = emitter.over(region.base, output)
        if region.token_dims > 1:
            output = emitter.by_dims_of_tokens(output)
        if region.addend is not None:
            output = emitter.plus(region.addend, output)
        if entered is not None:
            autocast.switched_back(region.graph, entered)
    output.meta["example_value"] = region.output
    _redirect_users(region, output)
    add_where_methods_are_called(emitter.made, region.result, region.output, cast=product is None)
    erased = _erase(region)
    return Rewritten(
        "mlp" if mlp is not None else "parallel_linear", mlp.activation if mlp is not None else "any", erased
    )


def _redirect_users(region: MoERegion, output: fx.Node) -> None:
    """Whoever reads the output after the region reads the op's."""
    places = region.places()
    for holder in region.holders:
        for user in list(holder.users):
            if places[user] > places[region.result]:
                user.replace_input_with(holder, output)


def _erase(region: MoERegion) -> frozenset[int]:
    """Erases the region and what only the region needed."""
    doomed = {*region.inner, *region.outputs}
    stack = [source for node in doomed for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in doomed and not node.is_impure() and not written(node) and not draws_random(node):
            doomed.add(node)
            stack.extend(node.all_input_nodes)
    events: set[int] = set()
    for node in sorted(doomed, reverse=True):
        if not node.users:
            events.update(events_of(node))
            region.graph.erase_node(node)
    return frozenset(events)
