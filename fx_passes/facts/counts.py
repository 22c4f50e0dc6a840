"""How many slots each expert has, and what a mask or a count says once it is cast or compared with zero.

T tokens, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from fx_passes.facts.gate_masks import compared, open_gates
from fx_passes.facts.gate_slots import ids_that_are_counted
from fx_passes.facts.ids import ids_dims, num_columns
from fx_passes.facts.masks import flat_ids
from fx_passes.facts.slots import Experts, slot_fact
from fx_passes.facts.statements import Counts, Fact, Hit, Kept, Mask, Occupied, OneHot
from fx_passes.facts.tallies import EXACT_BYTES, NAMES, tallied, tallied_table
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import arg, fake_tensor, known_tensor, op_name


def _cast(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`.to(...)` of zeros and ones, or of bools, keeps their meaning; so does a move to another device."""
    value = fake_tensor(node)
    if isinstance(inner, Hit) and not inner.as_tuple and value is not None:
        return inner if value.dtype in (torch.int32, torch.int64) else None
    if isinstance(inner, Counts) and not inner.positive and value is not None:
        exact = known_tensor(arg(node, 0, "input")).dtype.itemsize >= EXACT_BYTES
        return inner if exact and value.dtype in (torch.int32, torch.int64) else None
    if inner is None and value is not None and value.dtype == torch.bool:
        return open_gates(arg(node, 0, "input"))
    return inner if isinstance(inner, (OneHot, Mask, Kept)) else None


def _reduce(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`sum` or `any` over tokens and slots.

    Of a one-hot tensor it counts the tokens of each class; of a mask, those of one expert.
    """
    if not node.kwargs.keys() <= {"input", "dim", "keepdim"}:
        return None
    dims = _reduced_dims(node)
    keepdim = arg(node, 2, "keepdim", False)
    counted = _counted_rows(node) if op_name(node) == "sum" and dims in ((0,), (-2,)) and not keepdim else None
    if counted is not None:
        return counted
    if isinstance(inner, Mask) and dims is None:
        return Occupied(inner)
    if not isinstance(inner, (OneHot, Mask)) or dims is None:
        return None
    kept = tuple(label for at, label in enumerate(inner.dims) if at not in dims and at - len(inner.dims) not in dims)
    if [label for label in inner.dims if label not in kept] == ["K"]:
        with_one = tuple("1" if label == "K" else label for label in inner.dims)
        return replace(inner, dims=with_one if keepdim else kept, reduced=True)
    if kept != ("E",) or isinstance(inner, Mask) or keepdim:
        return None
    return Counts(inner.ids, inner.num_classes, positive=op_name(node) == "any", reduced=inner.reduced)


def _bincount(node: fx.Node, _inner: Fact | None) -> Fact | None:
    ids, classes = arg(node, 0, "input"), arg(node, 2, "minlength", 0)
    if arg(node, 1, "weights") is not None or type(classes) is not int or ids_dims(ids) != ("T",):
        return None
    in_order = slot_fact(ids)
    flat = in_order.order.ids if isinstance(in_order, Experts) else flat_ids(ids) or ids
    columns = num_columns(flat)
    if columns is None:
        return Counts(flat, classes, open_ended=True) if classes > 0 else None
    return Counts(flat, max(classes, columns), open_ended=columns > classes)


def _histc(node: fx.Node, _inner: Fact | None) -> Fact | None:
    """With E bins from 0 to E - 1 the bin of expert e is [e, e + 1) (E - 1) / E: it holds the integer e alone.

    With E bins from 0 to E it is [e, e + 1), and the last one has E, too, which then must not occur.
    """
    bins, low, high = arg(node, 1, "bins", 100), arg(node, 2, "min", 0), arg(node, 3, "max", 0)
    ids = ids_in_bins(node)
    if type(bins) is not int or bins < 2 or low != 0 or high not in (bins - 1, bins) or ids is None:
        return None
    if high == bins and (num_columns(ids) or bins + 1) > bins:
        return None
    return Counts(ids, bins)


def ids_in_bins(node: fx.Node) -> fx.Node | None:
    """The ids that `node`, a `histc`, counts, whether or not each has a bin of its own."""
    values = arg(node, 0, "input")
    if op_name(values) in ("float", "to", "double") and known_tensor(values).dtype.itemsize >= EXACT_BYTES:
        values = values.args[0]
    return flat_ids(values) or values if ids_dims(values) is not None else None


def _searchsorted(node: fx.Node, _inner: Fact | None) -> Fact | None:
    """`searchsorted(sorted_ids, arange(E), right=True)`: how many slots have this class or one before it."""
    experts, classes = slot_fact(arg(node, 0, "sorted_sequence")), arg(node, 1, "input")
    sizes = known_tensor(classes).shape if fake_tensor(classes) is not None else ()
    is_right = node.kwargs.get("right", False) is True or node.kwargs.get("side") == "right"
    if not isinstance(experts, Experts) or not is_right or node.kwargs.get("sorter") is not None:
        return None
    if len(sizes) != 1 or type(sizes[0]) is not int or not numbers_rows(classes, sizes[0]):
        return None
    return Counts(experts.order.ids, sizes[0], cumulative=True)


def _cumsum(node: fx.Node, inner: Fact | None) -> Fact | None:
    if not isinstance(inner, Counts) or inner.positive or inner.cumulative or arg(node, 1, "dim") not in (0, -1):
        return None
    return replace(inner, cumulative=True) if known_tensor(node).dtype in (torch.int32, torch.int64) else None


def _counted_rows(total: fx.Node) -> Counts | None:
    """The sum over tokens of a table [T, E] of zeros and ones, or of `gates > 0`."""
    entries = arg(total, 0, "input")
    while op_name(entries) in ("to", "long", "int"):
        entries = arg(entries, 0, "input")
    tallied = tallied_table(entries, total)
    if tallied is not None:
        return tallied
    ids = ids_that_are_counted(entries)
    if ids is None:
        return None
    return Counts(ids, known_tensor(entries).shape[1], reduced=True)


def _reduced_dims(node: fx.Node) -> Sequence[int] | None:
    dim = arg(node, 1, "dim")
    if dim is None:
        return None
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _greater(node: fx.Node, inner: Fact | None) -> Fact | None:
    if isinstance(inner, Counts) and inner.may_be_hits and arg(node, 1, "other") == 0:
        return replace(inner, positive=True)
    if isinstance(inner, (OneHot, Mask)) and arg(node, 1, "other") == 0:
        return inner
    return compared(node) if inner is None else None


def _at_least(node: fx.Node, inner: Fact | None) -> Fact | None:
    return compared(node) if inner is None else None


def _view_as(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`x.view_as(x)` is what Dynamo makes of `x.numpy()`."""
    return inner if isinstance(inner, Counts) and node.args[0] is node.args[1] else None


def _tallied(node: fx.Node, _inner: Fact | None) -> Fact | None:
    return tallied(node)


RULES: dict[str, Callable[[fx.Node, Fact | None], Fact | None]] = {
    **dict.fromkeys(("to", "bool", "int", "long", "float", "cpu"), _cast),
    **dict.fromkeys(("sum", "any", "count_nonzero"), _reduce),
    **dict.fromkeys(("gt", "greater", "ne"), _greater),
    **dict.fromkeys(("ge", "greater_equal"), _at_least),
    **dict.fromkeys(NAMES, _tallied),
    "bincount": _bincount,
    "histc": _histc,
    "cumsum": _cumsum,
    "searchsorted": _searchsorted,
    "view_as": _view_as,
}
