"""What goes in and out of a region: nothing but its output leaves it, nothing that it reads is written meanwhile.

T tokens, K experts per token.
"""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_passes.body.values import Gathered, PerExpert, SlotGathered
from fx_passes.capture import loops_of
from fx_passes.facts import fact, selected
from fx_passes.facts.gate_slots import gate_slots
from fx_passes.facts.ids import ids_are_distinct, num_tokens, sources_of_ids
from fx_passes.facts.statements import Counts, Hit, Listed
from fx_passes.facts.tallies import fills_of
from fx_passes.graph.aliasing import storage_of, writers_of, writes_before_reads
from fx_passes.graph.ops import (
    ZEROS,
    arg,
    draws_random,
    example,
    fake_tensor,
    is_inplace,
    known_tensor,
    op_name,
    written,
)
from fx_passes.graph.said import said_of
from fx_passes.region import LoopRegion, MoERegion, Rejected


def no_intermediate_escapes(region: MoERegion) -> None:
    """What is computed from an expert's rows ends in the output, or in a check that dies with the region."""
    inside = set(region.inner)
    needed = _ancestors(region, inside)
    known: dict[fx.Node, bool] = {}
    for node in sorted(inside - needed):
        if not _is_dead_end(node, inside, known):
            seen = next((source for source in node.all_input_nodes if source in needed - {region.result}), node)
            raise Rejected("no_intermediate_escapes", seen, f"{said_of(seen)} is used outside the experts")
    for node in sorted(needed - {region.result}):
        for user in node.users:
            if user not in inside:
                raise Rejected("no_intermediate_escapes", user, f"{said_of(node)} is used outside the experts")


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
    if op_name(question) in ("eq", "le", "ge") and _are_as_many(question.args[0], question.args[1]):
        return True
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
    """The largest value of `size`, where it is how many slots an expert has, how many experts or gates are listed."""
    listed, gated = fact(size.args[0]), gate_slots(size.args[0])
    if gated is not None:
        return known_tensor(gated.gates).numel()
    if isinstance(listed, Hit):
        return listed.num_classes
    if isinstance(listed, Listed):
        return known_tensor(listed.one_hot.ids).numel()
    mask = selected(size.args[0])
    if mask is None:
        return None
    once_a_token = mask.reduced or mask.slot is not None or ids_are_distinct(mask.ids)
    return num_tokens(mask.ids) if once_a_token else known_tensor(mask.ids).numel()


def no_other_loop_holds_the_region(region: MoERegion) -> None:
    """Where one iteration was traced for a whole loop, the region is in that iteration or has nothing to do with it.

    A loop around the region runs it more than once, and what comes after a loop knows its last expert alone.
    """
    own = frozenset(() if region.symbol is None else (region.symbol,))
    for node in sorted(region.inner | region.body.nodes):
        if not loops_of(node) <= own:
            raise Rejected("no_other_loop_holds_the_region", node, "the experts run within another loop over experts")
    if loops_of(region.anchor) != own:
        raise Rejected("no_other_loop_holds_the_region", region.anchor, "an expert of a loop is used after that loop")


def nothing_is_written_inside(region: MoERegion) -> None:
    """From the routing's first node to the result nothing that the region reads is written, save by itself.

    Nor is a rearranged copy of it that the code reads in its place: the rewritten code has none.
    """
    places, own = region.places(), region.writes
    first, last = min(places[node] for node in region.routing | moved(region)), places[region.result]
    writers = {writer for node in _outer_inputs(region) for writer in writers_of(node)}
    writers.difference_update(_fills(region))
    writers |= {user for node in region.inner for user in node.users if node in written(user)}
    for node in sorted(writers - own, key=places.__getitem__):
        if first < places[node] < last:
            name = op_name(node) or node.target
            raise Rejected("nothing_is_written_inside", node, f"`{name}` writes to something that the experts read")


def _fills(region: MoERegion) -> Iterator[fx.Node]:
    """The write of `table = zeros(...)`, `table.scatter_(...)` where nobody reads the table of weights before it.

    So for zeros that count the ids: rewritten code doesn't read them.
    """
    for node in region.routing:
        yield from fills_of(node) if isinstance(fact(node), Counts) else ()
    for weights in region.body.of(SlotGathered):
        zeros = storage_of(weights.source)
        writes = writes_before_reads(zeros) if weights.table and op_name(zeros) in ZEROS else []
        if len(writes) == 1 and op_name(writes[0]) == "scatter_" and region.inner.isdisjoint((zeros, *writes)):
            yield from writes


def tensors_for_backward_stay_as_they_are(region: MoERegion) -> None:
    """Operators keep what they read: naive code keeps copies of rows in its place, and no biases."""
    rows = fake_tensor(region.body.root.node)
    if rows is None or not rows.requires_grad:
        return
    places = region.places()
    for kept in (*_gathered(region), *_parameters(region)):
        for node in writers_of(kept):
            if places[node] > places[region.result]:
                detail = f"{said_of(kept)} is written after the experts"
                raise Rejected("tensors_for_backward_stay_as_they_are", node, detail)


def moved(region: MoERegion) -> frozenset[fx.Node]:
    """Views and rearranged copies of the ids, of what is gathered and of parameters, which the region reads."""
    sources = {region.ids_TK, *_gathered(region), *_parameters(region)}
    steps: set[fx.Node] = set()
    for reader in region.inner | region.routing | region.body.nodes:
        for node in reader.all_input_nodes:
            chain = list(takewhile(lambda step: step not in sources, _moves(node)))
            if chain and arg(chain[-1], 0, "input") in sources:
                steps.update(chain)
    return frozenset(steps)


def _gathered(region: MoERegion) -> Iterator[fx.Node]:
    yield from (value.source for value in (*region.body.of(Gathered), *region.body.of(SlotGathered)))


def _parameters(region: MoERegion) -> Iterator[fx.Node]:
    yield from (node for parameter in region.body.of(PerExpert) for node in parameter.parameters)


def _starts(region: MoERegion) -> Iterator[fx.Node]:
    """What the output goes on from without writing to it, which rewritten code reads last."""
    starts = (region.addend, region.base if isinstance(region, LoopRegion) else None)
    yield from (node for node in starts if node is not None and node not in region.holders)


def _moves(node: Any) -> Iterator[fx.Node]:
    """`node` and what it was made of, as long as each only moves or repeats the entries of the one before."""
    while isinstance(node, fx.Node) and op_name(node) in _MOVES and not is_inplace(node):
        yield node
        node = arg(node, 0, "input")


_MOVES = frozenset(
    """
    view reshape flatten ravel unflatten squeeze unsqueeze expand expand_as repeat repeat_interleave contiguous clone
    detach to long int transpose swapaxes swapdims permute t getattr select getitem chunk split unbind
    """.split()
)


def _outer_inputs(region: MoERegion) -> Iterator[fx.Node]:
    yield from sources_of_ids(region.ids_TK)
    yield from _gathered(region)
    yield from _starts(region)
    yield from moved(region)
    yield from region.routing
    yield from (source for node in region.routing for source in node.all_input_nodes)
    yield from _parameters(region)
    own = region.inner.union(region.outputs)
    for node in region.inner:
        yield from (source for source in node.all_input_nodes if source not in own)
