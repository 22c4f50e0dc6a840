"""Experts' numbers of rows that are put into a tensor, as sums of masks.

torch.tensor([len(tokens) for tokens in lists])     becomes     torch.stack([mask.sum() for mask in masks])

What lists the rows then serves the experts alone, and may go with them.
"""

from typing import Any

import torch
from torch import fx

from fx_passes.facts import fact, selected
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import fake_tensor, known_tensor
from fx_passes.rewriting.example_values import add_where_methods_are_called


def sum_masks(graph: fx.Graph) -> bool:
    """Replaces each such tensor in `graph`; whether there was any."""
    found = [(node, masks) for node in graph.nodes if (masks := _counted_masks(node))]
    for node, masks in found:
        node.replace_all_uses_with(_sums(node, masks))
        graph.erase_node(node)
    return bool(found)


def _counted_masks(node: fx.Node) -> list[fx.Node]:
    """The masks whose true entries the items of `node` count; none where an item is anything else."""
    items = node.args[0] if node.target is torch._refs.tensor and len(node.args) == 1 else None
    if not isinstance(items, (list, tuple)) or node.kwargs.keys() - {"dtype", "device"}:
        return []
    masks = [_mask_of_length(item) for item in items]
    own = [mask for mask in masks if mask is not None]
    return own if len(own) == len(masks) else []


def _mask_of_length(size: Any) -> fx.Node | None:
    """The mask that is true as often as the positions are long of which `size` is the length."""
    if not isinstance(size, fx.Node) or size.target is not torch.ops.aten.sym_size.int or size.args[1:] != (0,):
        return None
    node, mask = size.all_input_nodes[0], selected(size.args[0])
    while fact(node) != mask and node.all_input_nodes:
        node = node.all_input_nodes[0]
    tensor = fake_tensor(node)
    is_mask = mask is not None and fact(node) == mask and tensor is not None and tensor.dtype == torch.bool
    return node if is_mask and not any(writers_of(node)) else None


def _sums(node: fx.Node, masks: list[fx.Node]) -> fx.Node:
    graph, result = node.graph, known_tensor(node)
    with graph.inserting_before(node):
        sums = [graph.call_function(torch.sum, (mask,)) for mask in masks]
        stack = graph.call_function(torch.stack, (sums,))
        whole = graph.call_method("to", (stack, result.device, result.dtype))
    for made in (*sums, stack, whole):
        made.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
    whole.meta["example_value"] = result
    add_where_methods_are_called((stack, whole), node, result, cast=False)
    return whole
