"""What a tensor from outside is beside rows: tokens, a weight for each slot, or experts' parameters.

An input gets its meaning from where it stands: the dim that is lined up with the tokens of the rows is the dim of
tokens. T tokens (B * S in two dims), K experts per token, N = T * K slots, E experts, M = E * T pairs.
"""

from dataclasses import replace

import torch
from torch import fx

from fx_passes.batched.row_graph import RowGraph
from fx_passes.batched.rows import PARTS, Input, Labels
from fx_passes.body.values import Gathered, PerExpert, SlotGathered, Value
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name
from fx_passes.graph.said import said_of
from fx_passes.graph.views import Dim, View, views_of
from fx_passes.region import Rejected

_INDEXED: dict[tuple[Dim, ...], Labels] = {((0,), (1,)): ("T", "K"), ((0, 1),): ("N",), ((0,),): ("N",)}


def resolve(graph: RowGraph, source: Input, labels: Labels, *kinds: type) -> Value | None:
    """What a row of `source` is, whose first dims count rows as `labels` say; None where it is none of `kinds`."""
    for view in source.views:
        value = _resolve_view(graph, view, labels)
        if isinstance(value, kinds):
            graph.steps.update(view.steps)
            return value
    return None


def index_of(node: fx.Node) -> fx.Node | None:
    """The tensor that `node` indexes the first dim of another with."""
    name, index = op_name(node), None
    if name == "getitem":
        index = node.args[1][0] if isinstance(node.args[1], tuple) and node.args[1][1:] == (Ellipsis,) else node.args[1]
    elif name == "index_select" and arg(node, 1, "dim") == 0:
        index = arg(node, 2, "index")
    return index if isinstance(index, fx.Node) and fake_tensor(index) is not None else None


def index_labels(index: fx.Node, ids: fx.Node | None) -> Labels | None:
    """The dims in which `index` holds `ids`, which are [T, K] or flat."""
    dims = next((view.dims for view in views_of(index) if view.start is ids), None)
    return _INDEXED.get(dims or ())


def is_gathered(node: fx.Node, ids: fx.Node | None) -> bool:
    """Whether `node` is `W[ids]`."""
    index = index_of(node) if ids is not None else None
    return index is not None and index_labels(index, ids) is not None


def gathered(node: fx.Node, source: Input, ids: fx.Node | None) -> Input | None:
    """`W[ids]`, where `source` is W; None where `node` does not index with a tensor."""
    index = index_of(node)
    if index is None:
        return None
    labels = index_labels(index, ids)
    if labels is None:
        raise Rejected("rows_are_taken_in_one_order", node, f"{said_of(node)} is not taken by the experts of the rows")
    own = tuple(("p", label) for label in labels)
    whole = Input(tuple(view for view in source.views if view.dims[:1] == ((0,),)))
    return whole.moved(lambda view: View(view.start, (*own, *view.dims[1:]), (*view.steps, node)))


def repeats_tokens(seen: object) -> bool:
    """Whether `seen` is tokens, repeated for each expert."""
    return isinstance(seen, Input) and any(view.dims[:1] and view.dims[0][:1] == ("t",) for view in seen.views)


def lined_up(source: Input, rank: int) -> Input:
    """`source` as it broadcasts to `rank` dims."""
    return source.moved(lambda view: replace(view, dims=padded(view.dims, rank)))


def padded(dims: tuple[Dim, ...], count: int) -> tuple[Dim, ...]:
    return ((),) * (count - len(dims)) + dims


def _resolve_view(graph: RowGraph, view: View, labels: Labels) -> Value | None:
    stands: dict[str, int | str] = {}
    for label, dim in zip(labels, view.dims, strict=False):
        found = _counted(label, dim)
        if found is None:
            return None
        stands.update(found)
    if ("outer" in stands or "inner" in stands) and not _is_whole(stands):
        return None
    features = view.dims[len(labels) :]
    if set(stands) == {"p"} or stands == {"E": 0}:
        return _parameter(graph, view.start, features)
    start = known_tensor(view.start)
    single = stands == {"N": 0} and graph.sizes["K"] == 1
    own = tuple((dim,) for dim in range(1, start.dim()))
    if (stands == {"T": 0} or single) and start.dim() == 2 and features == own:
        return graph.leaf(Gathered, view.start, start.shape[1:])
    if stands == {"B": 0, "S": 1} and start.dim() == 3 and features == own[1:]:
        return graph.leaf(Gathered, view.start, start.shape[2:])
    if not stands or features.count(()) != len(features):
        return None
    units = (1,) * len(features)
    if stands == {"T": 0, "K": 1} or (stands == {"N": 0} and (start.dim() == 1 or single)):
        return graph.leaf(SlotGathered, view.start, units, trailing=len(units))
    if stands in ({"T": 0, "E": 1}, {"B": 0, "S": 1, "E": 2}) or (stands == {"T": 1, "E": 0} and start.dim() == 2):
        first = stands["E"] == 0
        return graph.leaf(SlotGathered, view.start, units, trailing=len(units), table=True, experts_first=first)
    return None


def _is_whole(stands: dict[str, int | str]) -> bool:
    """Whether both parts of a dim of tokens stand where they belong: then it is noted as a whole."""
    outer, inner = stands.pop("outer", None), stands.pop("inner", None)
    stands["T"] = outer if outer is not None else -1
    return outer == inner


def _parameter(graph: RowGraph, stacked: fx.Node, features: tuple[Dim, ...]) -> Value | None:
    tensor: torch.Tensor = known_tensor(stacked)
    own = tuple((dim,) for dim in range(1, tensor.dim()))
    if features not in (own, own[::-1]):
        return None
    return graph.leaf(PerExpert, stacked, tensor.shape[1:], stacked=stacked, transposed=features != own)


def _counted(label: str, dim: Dim) -> dict[str, int | str] | None:
    """Which dims of its start a view has where rows are counted by `label`."""
    if dim == ():
        return {}
    if dim[0] == "p":
        return {"p": label} if dim[1] == label else None
    if len(dim) == 1 and label in ("T", "K", "E", "B", "S"):
        return {label: dim[0]}
    if dim[0] == {"B": "outer", "S": "inner"}.get(label):
        return {dim[0]: dim[1]}
    if label in ("N", "M"):
        if dim[0] == {"N": "r", "M": "t"}[label]:
            return {"T": dim[1]}
        if len(dim) == 1 and label == "N":
            return {"N": dim[0]}
        if len(dim) == 2 and isinstance(dim[0], int):
            return dict(zip(PARTS[label], dim, strict=True))
    return None
