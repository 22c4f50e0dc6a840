"""Every slot takes a copy of its expert's weights, and all slots are multiplied at once.

    h = torch.einsum("td,tkfd->tkf", x, up[ids])                                    # up[ids]: [T, K, F, D]
    y = torch.einsum("tkf,tkdf->tkd", activation(h), down[ids])
    out = torch.einsum("tkd,tk->td", y, weights)

or flat, as `batched_mm` of transformers 5:

    h = torch.bmm(up[ids.reshape(-1)], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[ids.reshape(-1)], activation(h).unsqueeze(-1)).squeeze(-1)
    out = (y * weights.reshape(-1, 1)).view(T, K, D).sum(1)

Biases are gathered in the same way. Ids that were clamped are routed as they were clamped, and negative ones count from
the end, as in Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fx_passes.batched.inputs import index_labels, index_of
from fx_passes.batched.rows import SLOTS, Total
from fx_passes.batched.walk import Walk
from fx_passes.body.values import PerExpert
from fx_passes.facts.ids import are_nonnegative
from fx_passes.forms.accumulation import closure
from fx_passes.forms.summation import summation
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name
from fx_passes.graph.views import views_of
from fx_passes.region import MoERegion, Rejected

NAME = "gathered_weights"

INDEXED = "ids outside -E..E-1 give zeros where indexing raises"


@dataclass(frozen=True)
class Picks:
    """The nodes `W[ids]` with matrices W, and the ids, [T, K] or flat."""

    ids: fx.Node
    top_k: int
    picks: tuple[fx.Node, ...]


def candidates(graph: fx.Graph) -> Iterator[Picks]:
    """Matrices that are gathered by the same ids, and multiplied with."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        ids = _ids_of_picked_matrices(node)
        if ids is not None:
            groups.setdefault(ids, []).append(node)
    for ids, picks in groups.items():
        top_k = _top_k(ids)
        if top_k is not None:
            yield Picks(ids, top_k, tuple(picks))


def match(found: Picks) -> MoERegion:
    everything = closure(found.picks, stops=frozenset())
    walk = Walk(everything, SLOTS, _sizes(found), found.ids)
    node, total = _total(walk, everything, found)
    end = summation(node, total, found.picks)
    body = walk.body(total.rows)
    return MoERegion(
        form=NAME,
        ids_TK=found.ids,
        top_k=found.top_k,
        num_experts=_num_experts(body.of(PerExpert), found.picks[0]),
        body=body,
        routing=frozenset((*found.picks, *walk.steps)),
        inner=end.inner,
        result=end.result,
        output=known_tensor(end.result),
        writes=end.writes | walk.writes,
        deviations=() if op_name(found.ids) in ("clamp", "clip") else (INDEXED,),
        buffers=end.buffers,
        addend=end.addend,
        counts_from_the_end=not are_nonnegative(found.ids),
    )


def _ids_of_picked_matrices(node: fx.Node) -> fx.Node | None:
    """What the index of `W[index]` is a view of, where the result is multiplied with."""
    index = index_of(node)
    weights = fake_tensor(arg(node, 0, "input")) if index is not None else None
    if index is None or weights is None or weights.dim() != 3 or not weights.is_floating_point():
        return None
    multiplied = any(op_name(user) in ("bmm", "matmul", "einsum") for user in _readers(node))
    if not multiplied or known_tensor(index).dtype not in (torch.int32, torch.int64):
        return None
    starts = (view.start for view in views_of(index) if index_labels(index, view.start) and _top_k(view.start))
    return next(starts, index)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads `node`, through views of it."""
    for user in node.users:
        yield user
        if op_name(user) in ("transpose", "permute", "getattr"):
            yield from user.users


def _top_k(ids: fx.Node) -> int | None:
    """K of ids [T, K]; flat ids that were clamped are those of what was flattened."""
    tensor = known_tensor(ids)
    if tensor.dim() == 1 and op_name(ids) in ("clamp", "clip") and isinstance(ids.args[0], fx.Node):
        return next((_top_k(view.start) for view in views_of(ids.args[0]) if view.dims == ((0, 1),)), None)
    return tensor.shape[1] if tensor.dim() == 2 and isinstance(tensor.shape[1], int) else None


def _sizes(found: Picks) -> dict[str, int | torch.SymInt]:
    shape = known_tensor(found.ids).shape
    slots = shape[0] * found.top_k if len(shape) == 2 else shape[0]
    return {"T": shape[0] if len(shape) == 2 else slots // found.top_k, "K": found.top_k, "N": slots}


def _total(walk: Walk, nodes: frozenset[fx.Node], found: Picks) -> tuple[fx.Node, Total]:
    for node in found.ids.graph.nodes:
        seen = walk.seen(node) if node in nodes else None
        if isinstance(seen, Total):
            return node, seen
    raise Rejected("slots_of_a_token_are_summed", found.picks[0], "rows with gathered weights are not summed by token")


def _num_experts(parameters: Iterator[PerExpert], at: fx.Node) -> int:
    counts = {known_tensor(parameter.stacked).shape[0] for parameter in parameters if parameter.stacked is not None}
    if len(counts) != 1 or not all(isinstance(count, int) for count in counts):
        raise Rejected("every_expert_is_covered", at, f"weights of {sorted(map(str, counts))} experts")
    return int(counts.pop())
