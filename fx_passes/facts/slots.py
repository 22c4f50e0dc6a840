"""What index tensors over slots mean, where all slots are sorted by expert at once.

A slot is one (token, expert) pair. `slot_fact(node)` says what a node holds for each of the N = T * K slots, or for
each expert, and is None where nothing is known:

    Flat        value[s] is entry s of a [T, K] tensor
    Sorted      what torch.sort(ids.flatten()) returns
    Experts     value[i] is the expert of the i-th slot in sorted order
    Order       value[i] is the i-th slot in sorted order
    Tokens      value[i] is the token of that slot: order // K, arange(T).repeat_interleave(K)[order]
    Inverse     value[s] is the place of slot s in sorted order
    Lengths     value[e] is how many slots expert e has
    Offsets     value[e] is where the slots of expert e end in sorted order
    Absent      value[i] is true where the i-th slot's expert is num_experts or more

Two sorts of the same ids may order equal ids differently: what depends on an order names the node that made it. T
tokens, K experts per token, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fx_passes.facts.gate_slots import EXPERTS, TOKENS, gate_slots, ids_of_listed
from fx_passes.facts.ids import ids_dims, num_tokens
from fx_passes.graph.aliasing import inplace_users
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name, same_size
from fx_passes.graph.views import numbers_tokens_of_slots


@dataclass(frozen=True)
class Flat:
    source: fx.Node


@dataclass(frozen=True)
class Order:
    ids: fx.Node
    sort: fx.Node


@dataclass(frozen=True)
class Sorted:
    order: Order


@dataclass(frozen=True)
class Experts:
    order: Order


@dataclass(frozen=True)
class Tokens:
    order: Order


@dataclass(frozen=True)
class Inverse:
    order: Order


@dataclass(frozen=True)
class Lengths:
    order: Order
    num_experts: int


@dataclass(frozen=True)
class Offsets:
    order: Order
    num_experts: int


@dataclass(frozen=True)
class Absent:
    order: Order
    num_experts: int


SlotFact = Flat | Sorted | Experts | Order | Tokens | Inverse | Lengths | Offsets | Absent


def order_of(known: Order | Tokens) -> Order:
    """The order in which `known` has its values."""
    return known if isinstance(known, Order) else known.order


_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
"""Dtypes that hold every expert's number."""


def slot_fact(node: Any) -> SlotFact | None:
    """What `node` says about slots; None where nothing is known. Results are kept on the node."""
    if not isinstance(node, fx.Node):
        return None
    if "scatter_moe_slot_fact" not in node.meta:
        rule = _RULES.get(op_name(node) or "")
        known = rule(node) if rule else None
        node.meta["scatter_moe_slot_fact"] = known or _of_gates(node)
    return node.meta["scatter_moe_slot_fact"]


def _of_gates(node: fx.Node) -> SlotFact | None:
    """The slots whose gates are not zero."""
    known, tensor = gate_slots(node), fake_tensor(node)
    ids = ids_of_listed(known.gates) if known is not None else None
    if known is None or ids is None or known.sort is None or tensor is None or tensor.dim() != 1:
        return None
    order = Order(ids, known.sort)
    return {TOKENS: Tokens(order), EXPERTS: Experts(order)}.get(known.kind)


def _flat(node: fx.Node) -> SlotFact | None:
    source = arg(node, 0, "input")
    before, after = fake_tensor(source), fake_tensor(node)
    if before is None or after is None or before.dim() != 2 or after.dim() != 1:
        return None
    return Flat(source)


def _flat_ids(node: Any) -> fx.Node | None:
    """The [T, K] ids that `node` holds flattened."""
    flat = slot_fact(node)
    return flat.source if isinstance(flat, Flat) and ids_dims(flat.source) == ("T", "K") else None


def _sort(node: fx.Node) -> SlotFact | None:
    ids = _flat_ids(arg(node, 0, "input"))
    if ids is None or not _is_ascending(node):
        return None
    order = Order(ids, node)
    return Sorted(order) if op_name(node) == "sort" else order


def _argsort(node: fx.Node) -> SlotFact | None:
    inner = slot_fact(arg(node, 0, "input"))
    if isinstance(inner, Order):
        return Inverse(inner) if _is_ascending(node) else None
    return _sort(node)


def _is_ascending(node: fx.Node) -> bool:
    """Whether a sort of one-dimensional values is ascending."""
    return arg(node, 1, "dim", -1) in (-1, 0) and arg(node, 2, "descending", False) is False


def _getitem(node: fx.Node) -> SlotFact | None:
    inner, index = slot_fact(node.args[0]), node.args[1]
    if isinstance(index, fx.Node):
        return _tokens_in_order(node.args[0], index)
    if not isinstance(inner, Sorted) or index not in (0, 1):
        return None
    return Experts(inner.order) if index == 0 else inner.order


def _index_select(node: fx.Node) -> SlotFact | None:
    is_first = arg(node, 1, "dim") in (0, -1)
    return _tokens_in_order(arg(node, 0, "input"), arg(node, 2, "index")) if is_first else None


def _tokens_in_order(numbers: Any, index: Any) -> SlotFact | None:
    """`arange(T).repeat_interleave(K)[order]`"""
    order = slot_fact(index)
    if not isinstance(order, Order):
        return None
    slots = known_tensor(order.ids).numel()
    return Tokens(order) if numbers_tokens_of_slots(numbers, num_tokens(order.ids), slots) else None


def _floor_divide(node: fx.Node) -> SlotFact | None:
    inner, divisor = slot_fact(arg(node, 0, "input")), arg(node, 1, "other")
    if op_name(node) in ("div", "divide") and node.kwargs.get("rounding_mode") not in ("floor", "trunc"):
        return None
    if not isinstance(inner, Order) or type(divisor) is not int:
        return None
    ids = fake_tensor(inner.ids)
    return Tokens(inner) if ids is not None and same_size(ids.shape[1], divisor) else None


def _cast(node: fx.Node) -> SlotFact | None:
    inner, tensor = slot_fact(arg(node, 0, "input")), fake_tensor(node)
    return inner if isinstance(inner, Experts) and tensor is not None and tensor.dtype in _EXACT else None


def _histc(node: fx.Node) -> SlotFact | None:
    """With E bins from 0 to E - 1 the bin of expert e is [e, e + 1) (E - 1) / E: it holds the integer e alone."""
    inner = slot_fact(arg(node, 0, "input"))
    bins, low, high = arg(node, 1, "bins", 100), arg(node, 2, "min", 0), arg(node, 3, "max", 0)
    if type(bins) is not int or bins < 2 or low != 0 or high != bins - 1:
        return None
    return Lengths(inner.order, bins) if isinstance(inner, Experts) else None


def _cumsum(node: fx.Node) -> SlotFact | None:
    inner, tensor = slot_fact(arg(node, 0, "input")), fake_tensor(node)
    if not isinstance(inner, Lengths) or arg(node, 1, "dim") not in (0, -1):
        return None
    return Offsets(inner.order, inner.num_experts) if tensor is not None and tensor.dtype == torch.int32 else None


def _greater_equal(node: fx.Node) -> SlotFact | None:
    inner, bound = slot_fact(arg(node, 0, "input")), arg(node, 1, "other")
    if not isinstance(inner, Experts) or type(bound) is not int:
        return None
    return Absent(inner.order, bound if op_name(node) == "ge" else bound + 1)


def _unsqueeze(node: fx.Node) -> SlotFact | None:
    inner = slot_fact(arg(node, 0, "input"))
    return inner if isinstance(inner, Absent) and arg(node, 1, "dim") in (-1, 1) else None


def _scattered_inverse(node: fx.Node) -> SlotFact | None:
    """`inverse = empty_like(order); inverse[order] = arange(N)`, read after that alone."""
    writes = inplace_users(node)
    if len(writes) != 1 or op_name(writes[0]) != "setitem":
        return None
    _, index, value = writes[0].args
    order = slot_fact(index)
    if not isinstance(order, Order) or any(user < writes[0] for user in node.users):
        return None
    if not numbers_rows(value, known_tensor(index).shape[0]):
        return None
    tensor = fake_tensor(node)
    is_index = tensor is not None and tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return Inverse(order) if is_index and arg(node, 0, "input") is index else None


_RULES: dict[str, Callable[[fx.Node], SlotFact | None]] = {
    "reshape": _flat,
    "view": _flat,
    "flatten": _flat,
    "sort": _sort,
    "argsort": _argsort,
    "getitem": _getitem,
    "index_select": _index_select,
    "gather": _index_select,
    "floordiv": _floor_divide,
    "floor_divide": _floor_divide,
    "div": _floor_divide,
    "divide": _floor_divide,
    "float": _cast,
    "int": _cast,
    "long": _cast,
    "to": _cast,
    "histc": _histc,
    "cumsum": _cumsum,
    "ge": _greater_equal,
    "gt": _greater_equal,
    "unsqueeze": _unsqueeze,
    "empty_like": _scattered_inverse,
}
