"""How many slots each expert has, read as a tensor: of as many numbers as there are experts.

torch.bincount(ids.flatten(), minlength=E)     becomes     torch.zeros(E).index_add(0, ids.flatten(), ones)

Dynamo can't know the length of the first, which depends on the largest id; we do, where all ids are below E. A loss or
a running count that is computed beside the experts then stays in the graph with them. Where no experts are rewritten
the frame is traced again, and the graph breaks there as it does for Dynamo alone, unless that captures it whole.
"""

import torch
from torch import fx

from fx_passes.capture import events_of, guards_of, loops_of
from fx_passes.facts import fact
from fx_passes.facts.ids import ids_are_below
from fx_passes.facts.statements import Counts
from fx_passes.graph.markers import expert_cat, expert_count, expert_places, expert_segment, experts_hit
from fx_passes.graph.ops import arg, known_tensor, op_name

_PYTHONS = frozenset((expert_cat, expert_count, expert_places, expert_segment, experts_hit))


def fix_lengths(graph: fx.Graph) -> set[int]:
    """Replaces each such tensor in `graph`; returns the events that were made for their lengths."""
    events: set[int] = set()
    for node in [node for node in graph.nodes if op_name(node) == "bincount"]:
        counts, lengths = fact(node), _lengths(node)
        if not isinstance(counts, Counts) or not ids_are_below(counts.ids, counts.num_classes):
            continue
        always_runs = not (loops_of(node) or guards_of(node))
        if lengths is not None and always_runs and _is_read_as_tensor(node):
            events.update(events_of(node))
            _replace(node, counts, lengths)
    return events


def _lengths(node: fx.Node) -> list[fx.Node] | None:
    """What asks for the length of `node` and asserts something of it, users first; None where it is used otherwise."""
    found: list[fx.Node] = []
    stack = [user for user in node.users if user.target is torch.ops.aten.sym_size.int]
    while stack:
        asked = stack.pop()
        if asked.users and op_name(asked) not in ("ge", "le", "eq") and asked not in node.users:
            return None
        if not asked.users and asked.target is not torch.ops.aten._assert_scalar.default and asked not in node.users:
            return None
        found.insert(0, asked)
        stack.extend(asked.users)
    return list(dict.fromkeys(found))


def _is_read_as_tensor(node: fx.Node) -> bool:
    """Whether more than Python's numbers is made of `node`."""
    for user in node.users:
        if user.target in _PYTHONS or user.target is torch.ops.aten.sym_size.int:
            continue
        if not isinstance(fact(user), Counts) or _is_read_as_tensor(user):
            return True
    return False


def _replace(node: fx.Node, counts: Counts, lengths: list[fx.Node]) -> None:
    graph, ids, value = node.graph, arg(node, 0, "input"), known_tensor(node)
    for asked in lengths:
        graph.erase_node(asked)
    with graph.inserting_before(node):
        zeros = graph.call_function(torch.zeros, (counts.num_classes,), {"dtype": value.dtype, "device": value.device})
        ones = graph.call_function(torch.ones_like, (ids,), {"dtype": value.dtype})
        total = graph.call_function(torch.index_add, (zeros, 0, ids, ones))
    for made in (zeros, ones, total):
        made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    total.meta |= {"example_value": value, "scatter_moe_fact": counts}
    node.replace_all_uses_with(total)
    graph.erase_node(node)
