"""Rows that lie expert by expert are cut into one segment an expert; what the experts make of them is put together.

    counts = ids.flatten().bincount(minlength=E).tolist()
    parts = [expert(segment) for expert, segment in zip(experts, rows.split(counts))]       # or rows[start:end]
    parts = [expert(segment) for ... if len(segment)]    # the same: a segment without rows adds none
    out = torch.cat(parts)                               # or: out[start:end] = expert(rows[start:end]), out fresh

The counts, and where segments begin and end, may be numbers or tensors. They may be added up in other ways,
`torch.zeros(E).scatter_add_(0, ids.flatten(), ones)`, `[int((ids == e).sum()) for e in range(E)]`. How the rows came to
lie so, and what becomes of them, is not looked at: row i of `out` is the work of the expert to whose segment row i of
`rows` belongs. An expert may be a single linear layer.

    rows, slots = x[order // K], zeros.index_add(0, order, out)                        # `order` is a sort of the ids

Such a copy at either side of a linear layer is spared: the layer reads and writes rows where they are.
"""

from collections.abc import Iterator

from torch import fx

from fx_passes.body.segment_body import numbers_of_slots, segment_body
from fx_passes.capture import guards_of
from fx_passes.facts import fact
from fx_passes.facts.statements import Counts
from fx_passes.forms.accumulation import closure
from fx_passes.graph.markers import expert_cat, expert_segment
from fx_passes.graph.ops import known_tensor
from fx_passes.region import GroupedRegion
from fx_passes.report import GRADIENTS

NAME = "segments"


def candidates(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.target is expert_cat)


def match(node: fx.Node) -> GroupedRegion:
    parts, counts = node.args
    known = fact(counts)
    assert isinstance(known, Counts) and isinstance(parts, (list, tuple))
    body = segment_body(tuple(parts), known)
    starts = [segment for segment in body.nodes if segment.target is expert_segment]
    starts += numbers_of_slots(node.graph, known.ids)
    return GroupedRegion(
        form=NAME,
        ids_TK=known.ids,
        top_k=known_tensor(known.ids).shape[1] if known_tensor(known.ids).dim() == 2 else 1,
        num_experts=known.num_classes,
        body=body,
        routing=frozenset((counts,)),
        inner=closure(starts, stops=frozenset((node,))) | {node},
        result=node,
        output=known_tensor(node),
        writes=body.writes,
        deviations=(GRADIENTS,) if any(guards_of(part) for part in parts) else (),
    )
