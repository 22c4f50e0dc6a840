"""Slots that are listed by the gates [T, E] which are not zero, as a dispatcher does that sorts them by expert.

    pairs = gates.nonzero()                           [M, 2]: token and expert of each
    experts, places = pairs.sort(0)                   each column for itself
    gates.nonzero()[places[:, 1], 0]                  the tokens, in the order of experts
    experts[:, 1], experts.split(1, 1)[1]             the experts, in that order

Where gates are provably zero outside of the ids that each token chose, every such pair is one of their slots. A slot
whose gate is zero nonetheless is left out: it is nobody's. T tokens, K experts per token, E experts, M pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fx_passes.facts.gate_masks import NOT_ZERO, ids_behind
from fx_passes.facts.ids import gated_ids, ids_are_distinct, ids_dims, num_columns
from fx_passes.graph.ops import arg, example, fake_tensor, normalized_dim, op_name, same_size, sizes_of
from fx_passes.graph.signs import is_nonnegative

PAIRS, SORTED, SORTED_PAIRS, PLACES = "pairs", "what sorts them", "pairs, sorted", "places of sorted pairs"
COLUMNS, ORDER, TOKENS, EXPERTS = "columns of sorted pairs", "order by expert", "tokens", "experts"


@dataclass(frozen=True)
class GateSlots:
    """`kind` says what a node holds of the pairs of `gates`; `sort` is what sorted them."""

    gates: fx.Node
    kind: str
    sort: fx.Node | None = None


def gate_slots(node: Any) -> GateSlots | None:
    """What `node` holds of listed gates; None where nothing is known."""
    rule = _RULES.get(op_name(node) or "") if isinstance(node, fx.Node) else None
    return rule(node) if rule is not None else None


def ids_of_listed(gates: Any) -> fx.Node | None:
    """The ids [T, K] of the slots whose gates are not zero; None where gates may be non-zero elsewhere."""
    ids = ids_behind(gates, NOT_ZERO)
    gated = gated_ids(ids) if ids is not None else None
    if ids is None or gated is None or ids_dims(ids) != ("T", "K") or ids_dims(gated.ids) != ("T", "K"):
        return None
    return ids if num_columns(gated.ids) == sizes_of(gates)[1] and ids_are_distinct(ids) else None


def ids_that_are_counted(entries: Any) -> fx.Node | None:
    """The ids of which `entries`, `gates != 0` or `gates > 0` where none is negative, has a true one for each slot."""
    name, gates = op_name(entries) if isinstance(entries, fx.Node) else None, arg(entries, 0, "input")
    if name not in ("ne", "gt", "greater") or arg(entries, 1, "other") != 0:
        return None
    return ids_of_listed(gates) if name == "ne" or is_nonnegative(gates) else None


def _nonzero(node: fx.Node) -> GateSlots | None:
    gates = arg(node, 0, "input")
    is_table = not node.kwargs.get("as_tuple", False) and ids_of_listed(gates) is not None
    return GateSlots(gates, PAIRS) if is_table else None


def _sort(node: fx.Node) -> GateSlots | None:
    inner = gate_slots(arg(node, 0, "input"))
    is_ascending = arg(node, 2, "descending", False) is False and arg(node, 1, "dim", -1) in (0, -2)
    return GateSlots(inner.gates, SORTED, node) if inner is not None and inner.kind == PAIRS and is_ascending else None


def _getitem(node: fx.Node) -> GateSlots | None:
    inner, index = gate_slots(node.args[0]), node.args[1]
    if inner is None:
        return None
    if inner.kind == SORTED:
        return replace(inner, kind=SORTED_PAIRS if index == 0 else PLACES) if index in (0, 1) else None
    if inner.kind == COLUMNS:
        return replace(inner, kind=EXPERTS) if index in (1, -1) else None
    if index in ((slice(None), 1), (slice(None), -1)):
        return _second(inner)
    if inner.kind != PAIRS or not isinstance(index, tuple) or len(index) != 2 or index[1] not in (0, -2):
        return None
    order = gate_slots(index[0])
    is_order = order is not None and order.kind == ORDER and order.gates is inner.gates
    return replace(order, kind=TOKENS) if order is not None and is_order else None


def _second(inner: GateSlots) -> GateSlots | None:
    """The second column."""
    kinds = {SORTED_PAIRS: EXPERTS, PLACES: ORDER}
    return replace(inner, kind=kinds[inner.kind]) if inner.kind in kinds else None


def _columns(node: fx.Node) -> GateSlots | None:
    """`experts.split(1, dim=1)`, `experts.chunk(2, dim=1)`, `experts.unbind(1)`."""
    inner, name = gate_slots(arg(node, 0, "input")), op_name(node)
    dim = arg(node, 1 if name == "unbind" else 2, "dim", 0)
    is_along = type(dim) is int and normalized_dim(dim, 2) == 1 and len(example(node)) == 2
    return replace(inner, kind=COLUMNS) if inner is not None and inner.kind == SORTED_PAIRS and is_along else None


def _reshape(node: fx.Node) -> GateSlots | None:
    """[M] as [M, 1], or the other way round."""
    inner, tensor = gate_slots(arg(node, 0, "input")), fake_tensor(node)
    if inner is None or inner.kind not in (TOKENS, EXPERTS) or tensor is None:
        return None
    return inner if tensor.dim() == 1 or (tensor.dim() == 2 and same_size(tensor.shape[1], 1)) else None


_RULES: dict[str, Callable[[fx.Node], GateSlots | None]] = {
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("split", "chunk", "unbind"), _columns),
    "nonzero": _nonzero,
    "sort": _sort,
    "getitem": _getitem,
}
