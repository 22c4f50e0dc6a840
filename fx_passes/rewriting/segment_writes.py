"""Rows that are written expert by expert are what the experts' rows are when they are put together.

    out = zeros(N, D)                                    # or empty
    for e, expert in enumerate(experts):
        out[start:end] = expert(rows[start:end])         # as captured: out[expert_places(counts, e)] = ...

becomes `out = expert_cat(parts, counts)`, where each expert's rows are written once and nothing reads them before.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fx_passes.capture.events import events_of, guards_of, tag
from fx_passes.facts import fact
from fx_passes.facts.statements import Counts
from fx_passes.graph.aliasing import is_read_before, writers_of
from fx_passes.graph.markers import expert_cat, expert_places
from fx_passes.graph.ops import EMPTY, ZEROS, fake_tensor, known_tensor, op_name, same_sizes, sizes_of
from fx_passes.region import Rejected

_RULE = "segments_are_written_once"


def written_by_segment(graph: fx.Graph) -> list[fx.Node]:
    """The tensors that experts write their rows to."""
    return list(dict.fromkeys(node.args[0] for node in graph.nodes if _places(node) is not None))


def put_together(rows: fx.Node) -> None:
    """Replaces `rows`, which experts write to, by what they write.

    Raises:
        Rejected: where that isn't the same.
    """
    places = {user: _places(user) for user in sorted(rows.users) if user.args[0] is rows}
    writes = {write: place for write, place in places.items() if place is not None}
    _require_fresh(rows, list(writes))
    counts, by_expert = _by_expert(writes)
    parts = [_part(write, rows, max(writes)) for write in by_expert]
    if len({known_tensor(part).dtype for part in parts}) != 1 or len(_grad_modes(writes)) != 1:
        raise Rejected(_RULE, max(writes), "experts write rows of another dtype, or in another grad mode")
    whole = _cat(rows, parts, counts, writes)
    for node in (*writes, *writes.values()):
        rows.graph.erase_node(node)
    rows.replace_all_uses_with(whole)
    rows.graph.erase_node(rows)


def _places(node: fx.Node) -> fx.Node | None:
    """What names the rows of an expert that `node` writes."""
    index = node.args[1] if op_name(node) == "setitem" else None
    return index if isinstance(index, fx.Node) and index.target is expert_places else None


def _require_fresh(rows: fx.Node, writes: list[fx.Node]) -> None:
    """`rows` is nobody else's, and nothing reads or writes it before the last expert has written."""
    is_own = op_name(rows) in ZEROS | EMPTY and not rows.kwargs.get("requires_grad", False)
    if not is_own or not known_tensor(rows).is_contiguous():
        raise Rejected(_RULE, writes[0], "the experts' rows are written to a tensor that is not fresh")
    if is_read_before(rows, writes):
        raise Rejected(_RULE, writes[-1], "the tensor is read or written before all experts have written")


def _by_expert(writes: dict[fx.Node, fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """The counts by which all is written, and the write of each expert; every expert has one."""
    experts: dict[Any, fx.Node] = {place.args[1]: write for write, place in writes.items()}
    counts: dict[Any, fx.Node] = {fact(place.args[0]): place.all_input_nodes[0] for place in writes.values()}
    (known, node), *others = counts.items()
    if others or not isinstance(known, Counts) or len(experts) != len(writes) or len(writes) != known.num_classes:
        raise Rejected("every_expert_is_covered", min(writes), "not every expert writes its rows, and once")
    return node, [experts[expert] for expert in range(known.num_classes)]


def _part(write: fx.Node, rows: fx.Node, last: fx.Node) -> fx.Node:
    """What `write` writes: a row for each of the expert's, which stays what it is until `last`."""
    _, places, part = write.args
    tensor = fake_tensor(part)
    sizes = (*sizes_of(places), *sizes_of(rows)[1:])
    if not isinstance(part, fx.Node) or tensor is None or not same_sizes(tensor.shape, sizes):
        raise Rejected(_RULE, write, "an expert writes something else than its rows")
    if any(write < writer < last for writer in writers_of(part)):
        raise Rejected(_RULE, write, "what an expert wrote is written to later")
    return part


def _grad_modes(writes: Iterable[fx.Node]) -> set[bool]:
    modes, enabled = set(), torch.is_grad_enabled()
    for node in min(writes).graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif node in writes:
            modes.add(enabled)
    return modes


def _cat(rows: fx.Node, parts: list[fx.Node], counts: fx.Node, writes: Iterable[fx.Node]) -> fx.Node:
    """The parts, put together where the last expert has written, in the dtype of `rows`."""
    graph, last, before = rows.graph, max(writes), known_tensor(rows)
    with graph.inserting_after(last):
        whole = graph.call_function(expert_cat, (parts, counts))
    made = [(whole, known_tensor(parts[0]).dtype)]
    if before.dtype != made[0][1]:
        with graph.inserting_after(whole):
            made.append((graph.call_method("to", (whole, before.dtype)), before.dtype))
    for node, dtype in made:
        node.meta.update(last.meta)
        tag(node, tuple(number for write in writes for number in events_of(write)), guards_of(last))
        node.meta["example_value"] = before.to(dtype)
    return made[-1][0]
