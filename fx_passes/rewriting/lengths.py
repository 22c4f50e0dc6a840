"""Experts' numbers of rows that are put into a tensor, as sums of masks.

torch.tensor([len(tokens) for tokens in lists])     becomes     torch.stack([mask.sum() for mask in masks])
counts[e] += len(tokens)                            becomes     counts[e] += (ids == e).sum()

What lists the rows then serves the experts alone, and may go with them. So may a guard around such a sum, which adds
zero where the expert has no tokens.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import fx

from fx_passes.capture import guards_of, loops_of, without_events
from fx_passes.facts import counted_mask, fact, selected
from fx_passes.facts.statements import Mask, Occupied
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import CASTS, fake_tensor, known_tensor, op_name
from fx_passes.rewriting.example_values import add_where_methods_are_called

_EXACT_BYTES = 4
"""A tensor with numbers of this size adds a tensor's number as it adds Python's: both are rounded once."""

_NUMBERS = {"iadd": 1, "add_": 1, "setitem": 2}
"""Which argument of an operation in place may be a number."""


def sum_masks(graph: fx.Graph) -> bool:
    """Replaces each such tensor and each such number in `graph`; whether there was any."""
    found = [(node, masks) for node in graph.nodes if (masks := _counted_masks(node))]
    for node, masks in found:
        node.replace_all_uses_with(_sums(node, masks))
        graph.erase_node(node)
    written = [(node, mask) for node in graph.nodes if (mask := _mask_of_number(node)) is not None]
    for node, mask in written:
        node.update_arg(_NUMBERS[op_name(node) or ""], _sum_of(node, mask))
        if op_name(node) != "setitem":
            _run_always(node, mask)
    for node in graph.nodes:
        mask = _mask_of_sum(node)
        if mask is not None and _run_always(node, mask):
            for part in _parts_of_sum(node.args[1]):
                without_events(part)
    return bool(found or written)


def _mask_of_sum(node: fx.Node) -> Mask | None:
    """The mask of whose true entries `node` adds the number, as a tensor."""
    adds = op_name(node) in ("iadd", "add_") and len(node.args) == 2 and not node.kwargs
    if not adds or fake_tensor(node.args[0]) is None or fake_tensor(node.args[1]) is None:
        return None
    *_, total = (node.args[1], *_casts(node.args[1]))
    return counted_mask(total)


def _casts(total: Any) -> Iterator[fx.Node]:
    """What `total` is a cast of, and that of, and so on."""
    while op_name(total) in CASTS and len(total.all_input_nodes) == 1:
        total = total.all_input_nodes[0]
        yield total


def _parts_of_sum(total: fx.Node) -> Iterator[fx.Node]:
    """What `total` is made of from the mask on. It has no effect."""
    for part in (total, *_casts(total)):
        yield part
        total = part
    while isinstance(fact(total), (Mask, Occupied)):
        yield total
        total = total.all_input_nodes[0]


def _mask_of_number(node: fx.Node) -> Mask | None:
    """The mask whose true entries `node` adds or assigns the number of; None where it does anything else."""
    place = _NUMBERS.get(op_name(node) or "", len(node.args))
    tensor = fake_tensor(node.args[0]) if place < len(node.args) and not node.kwargs else None
    size = node.args[place] if tensor is not None else None
    if tensor is None or tensor.dtype.itemsize < _EXACT_BYTES or tensor.is_complex() or not _is_length(size):
        return None
    mask = selected(size.args[0])
    if mask is None or not isinstance(mask.expert, int) or mask.ids.graph is not node.graph:
        return None
    return None if any(writers_of(mask.ids)) else mask


def _sum_of(node: fx.Node, mask: Mask) -> fx.Node:
    """How many slots of the ids are the expert's, before `node`, in the dtype of the tensor that it writes to."""
    graph, tensor = node.graph, known_tensor(node.args[0])
    with graph.inserting_before(node):
        ids = graph.call_function(torch.select, (mask.ids, -1, mask.slot)) if mask.slot is not None else mask.ids
        own = graph.call_function(torch.eq, (ids, mask.expert))
        own = graph.call_function(torch.any, (own, -1)) if mask.reduced else own
        total = graph.call_function(torch.sum, (own,))
        cast = graph.call_method("to", (total, tensor.device, tensor.dtype))
    for made in (ids, own, *own.all_input_nodes, total, cast):
        if made is not mask.ids:
            made.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack")}
    add_where_methods_are_called((total, cast), node, tensor, cast=False)
    return cast


def _run_always(addition: fx.Node, mask: Mask) -> bool:
    """What adds the number of an expert's rows may run where it was to be skipped for want of any: it adds zero.

    Whether that is known of `addition`.
    """
    entry = addition.args[0]
    if loops_of(addition) or not isinstance(entry, fx.Node):
        return False
    if any(
        guard[:2] != (mask.ids, mask.expert) or guard.slot not in (None, mask.slot) for guard in guards_of(addition)
    ):
        return False
    without_events(addition)
    if op_name(entry) == "getitem" and len(entry.all_input_nodes) == 1:
        own = [user for user in addition.users if _puts_back(user, addition, entry)]
        for node in (entry, *own):
            without_events(node)
    return True


def _puts_back(node: fx.Node, addition: fx.Node, entry: fx.Node) -> bool:
    """Whether `node` is the second half of `counts[e] += n`."""
    return op_name(node) == "setitem" and node.args == (*entry.args, addition)


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
    if not _is_length(size):
        return None
    node, mask = size.all_input_nodes[0], selected(size.args[0])
    while fact(node) != mask and node.all_input_nodes:
        node = node.all_input_nodes[0]
    tensor = fake_tensor(node)
    is_mask = mask is not None and fact(node) == mask and tensor is not None and tensor.dtype == torch.bool
    return node if is_mask and not any(writers_of(node)) else None


def _is_length(size: Any) -> TypeGuard[fx.Node]:
    return isinstance(size, fx.Node) and size.target is torch.ops.aten.sym_size.int and size.args[1:] == (0,)


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
