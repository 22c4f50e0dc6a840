"""What routing tensors mean.

A naive MoE loop hides its routing in tensor algebra: one_hot, permute, sum, `> 0`, nonzero, where. `fact(node)` reads
that algebra back and answers with a statement (`fx_passes.statements`), or None where it knows nothing.

T tokens, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_passes.aliasing import storage_of, writers_of
from fx_passes.ids import ids_dims, is_single_choice, num_columns, rows_as_ids
from fx_passes.markers import (
    Expert,
    expert_count,
    expert_of,
    expert_segment,
    experts_hit,
    experts_of_each,
    index_list,
    select_expert,
)
from fx_passes.ops import (
    ZEROS,
    arg,
    fake_tensor,
    keeps_last_dim,
    known_tensor,
    normalized_dim,
    only_pick,
    op_name,
    same_size,
    start_of_one,
    varargs,
)
from fx_passes.slots import Order, Tokens, order_of, slot_fact
from fx_passes.statements import (
    Counts,
    Fact,
    Hit,
    Kept,
    Listed,
    ListedMask,
    Mask,
    Occupied,
    OneHot,
    Rows,
    Selection,
    SlotOf,
)

_EXACT_BYTES = 4
"""Numbers of this size hold every count."""


def fact(node: Any) -> Fact | None:
    """What `node` says about the routing; None where nothing is known. Results are kept on the node."""
    if not isinstance(node, fx.Node):
        return None
    if "scatter_moe_fact" not in node.meta:
        node.meta["scatter_moe_fact"] = _derive(node)
    return node.meta["scatter_moe_fact"]


def _derive(node: fx.Node) -> Fact | None:
    if node.target is select_expert:
        return _select(fact(arg(node, 0, "input")), node.args[2], expert_of(node.args[1]), keepdim=node.args[3])
    if node.target is expert_segment:
        return _segment(node)
    if node.target is index_list:
        return fact(arg(node, 0, "input"))
    rule = _RULES.get(op_name(node) or "")
    return rule(node) if rule else None


def _segment(node: fx.Node) -> Fact | None:
    """An expert's segment of the slots, or of their tokens, that were sorted by expert."""
    rows, counts, expert = node.args
    order, known = slot_fact(rows), fact(counts)
    if not isinstance(order, (Order, Tokens)) or not isinstance(known, Counts) or order_of(order).ids is not known.ids:
        return None
    mask = Mask(known.ids, expert, ("N",), sort=order_of(order).sort)
    return Rows(mask, "T" if isinstance(order, Tokens) else "N")


def _one_hot(node: fx.Node) -> Fact | None:
    ids, classes = arg(node, 0, "input"), arg(node, 1, "num_classes", -1)
    dims = ids_dims(ids) if isinstance(ids, fx.Node) else None
    if dims is None or not isinstance(classes, int) or classes <= 0:
        return None
    return OneHot(ids, classes, (*dims, "E"))


def _same(node: fx.Node) -> Fact | None:
    return fact(arg(node, 0, "input"))


def _cast(node: fx.Node) -> Fact | None:
    """`.to(...)` of zeros and ones, or of bools, keeps their meaning; so does a move to another device."""
    inner = fact(arg(node, 0, "input"))
    value = fake_tensor(node)
    if isinstance(inner, Counts) and not inner.positive and value is not None:
        exact = known_tensor(arg(node, 0, "input")).dtype.itemsize >= _EXACT_BYTES
        return inner if exact and value.dtype in (torch.int32, torch.int64) else None
    return inner if isinstance(inner, (OneHot, Mask)) else None


def _permute(node: fx.Node) -> Fact | None:
    inner, order = fact(arg(node, 0, "input")), varargs(node, 1, "dims")
    if not isinstance(inner, (OneHot, Mask)) or len(order) != len(inner.dims):
        return None
    return replace(inner, dims=tuple(inner.dims[dim] for dim in order))


def _transpose(node: fx.Node) -> Fact | None:
    inner, name = fact(arg(node, 0, "input")), op_name(node)
    if not isinstance(inner, (OneHot, Mask)) or (name == "getattr" and (node.args[1] != "T" or len(inner.dims) != 2)):
        return None
    dims = list(inner.dims)
    first, second = (arg(node, 1, "dim0"), arg(node, 2, "dim1")) if name in ("transpose", "swapaxes") else (0, 1)
    dims[first], dims[second] = dims[second], dims[first]
    return replace(inner, dims=tuple(dims))


def _getitem(node: fx.Node) -> Fact | None:
    if len(node.args) != 2:
        return None
    source, index = node.args
    inner = fact(source)
    if isinstance(inner, Selection):
        return _column(inner, index)
    if isinstance(inner, OneHot):
        return _index_one_hot(inner, index)
    if isinstance(inner, Listed):
        return _index_listed(inner, index)
    if isinstance(inner, SlotOf):
        rows = chosen_tokens(index)
        return Rows(rows, "K") if rows is not None and inner.mask.key == rows.key and rows.reduced else None
    return inner if isinstance(inner, Hit) and index == slice(None) else None


def _index_listed(listed: Listed, index: Any) -> Fact | None:
    """Positions along one dim, and those of one class among them."""
    if not listed.axis:
        return replace(listed, axis=listed.one_hot.dims[index]) if type(index) is int and index >= 0 else None
    chosen = fact(index)
    if not isinstance(chosen, ListedMask) or chosen.one_hot != listed.one_hot or listed.axis not in ("T", "K"):
        return None
    dims = tuple(label for label in chosen.one_hot.dims if label != "E")
    return Rows(Mask(chosen.one_hot.ids, chosen.expert, dims), listed.axis)


def _column(selection: Selection, index: Any) -> Fact | None:
    if not selection.as_tuple:
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)):
            return None
        index = index[1]
    if not isinstance(index, int) or not -len(selection.mask.dims) <= index < len(selection.mask.dims):
        return None
    axis = selection.mask.dims[index]
    return Rows(selection.mask, axis) if axis in ("T", "K", "N") else None


def _divide(node: fx.Node) -> Fact | None:
    """`slots // K` are tokens and `slots % K` their choices."""
    rows, divisor, name = fact(arg(node, 0, "input")), arg(node, 1, "other"), op_name(node)
    if not isinstance(rows, Rows) or rows.axis != "N" or type(divisor) is not int:
        return None
    ids = fake_tensor(rows.mask.ids)
    if ids is None or not same_size(ids.shape[1], divisor):
        return None
    if name in ("div", "divide") and node.kwargs.get("rounding_mode") != "floor":
        return None
    return Rows(rows.mask, "K" if name in ("mod", "remainder", "fmod") else "T")


def _index_one_hot(one_hot: OneHot, index: Any) -> Fact | None:
    """`mask[e]`, `mask[..., e]`, `mask[:, :, e]`, `mask[e:e+1]` with a Python int e."""
    items = index if isinstance(index, tuple) else (index,)
    pick = only_pick(items, len(one_hot.dims))
    if pick is None:
        return None
    dim, item = pick
    if type(item) is int:
        return _select(one_hot, dim, item, keepdim=False)
    start = start_of_one(item)
    return _select(one_hot, dim, start, keepdim=True) if start is not None else None


def _select(inner: Fact | None, dim: Any, expert: Expert | None, keepdim: Any) -> Fact | None:
    if not isinstance(inner, OneHot) or expert is None or inner.dims[dim] != "E":
        return None
    if type(expert) is int and not 0 <= expert < inner.num_classes:
        return None
    if (experts_of_each(expert) or 0) > inner.num_classes:
        return None
    dims = (*inner.dims[:dim], *(("1",) if keepdim else ()), *inner.dims[dim + 1 :])
    return Mask(inner.ids, expert, dims, reduced=inner.reduced)


def _squeeze(node: fx.Node) -> Fact | None:
    inner, dim = fact(arg(node, 0, "input")), arg(node, 1, "dim")
    if not isinstance(inner, Mask) or not isinstance(dim, int):
        return None
    dim = normalized_dim(dim, len(inner.dims))
    if inner.dims[dim] != "1":
        return None
    return replace(inner, dims=inner.dims[:dim] + inner.dims[dim + 1 :])


def _unsqueeze(node: fx.Node) -> Fact | None:
    inner, dim = fact(arg(node, 0, "input")), arg(node, 1, "dim")
    if not isinstance(inner, Mask) or not isinstance(dim, int):
        return None
    dim = normalized_dim(dim, len(inner.dims) + 1)
    return replace(inner, dims=(*inner.dims[:dim], "1", *inner.dims[dim:]))


def _eq(node: fx.Node) -> Fact | None:
    """`ids == e`, and `one_hot[...] == 1`."""
    left, right = arg(node, 0, "input"), arg(node, 1, "other")
    inner = fact(left)
    if isinstance(inner, (OneHot, Mask)) and right == 1:
        return inner
    expert = expert_of(right)
    if expert is None and type(right) is int:
        expert = right
    if not isinstance(left, fx.Node) or expert is None or op_name(left) == "one_hot":
        return None
    if isinstance(inner, Listed):
        return ListedMask(inner.one_hot, expert) if inner.axis == "E" else None
    column = _column_of_ids(left)
    if column is not None:
        return Mask(column[0], expert, ("T",), slot=column[1])
    flat = _flat_ids(left)
    if flat is not None:
        return Mask(flat, expert, ("N",))
    dims = ids_dims(left)
    return Mask(left, expert, dims) if dims else None


def _flat_ids(node: fx.Node) -> fx.Node | None:
    """ids where `node` is `ids.view(-1)`, with more than one slot a token."""
    source = arg(node, 0, "input")
    if op_name(node) not in ("view", "reshape", "flatten", "ravel") or not isinstance(source, fx.Node):
        return None
    is_flat = ids_dims(source) == ("T", "K") and ids_dims(node) == ("T",)
    return source if is_flat and not is_single_choice(source) else None


def _column_of_ids(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(ids, k) where `node` is `ids[:, k]`."""
    source = arg(node, 0, "input")
    if not isinstance(source, fx.Node) or ids_dims(source) != ("T", "K"):
        return None
    if op_name(node) == "getitem" and isinstance(node.args[1], tuple) and len(node.args[1]) == 2:
        rows, slot = node.args[1]
    elif op_name(node) == "select" and arg(node, 1, "dim") in (1, -1):
        rows, slot = slice(None), arg(node, 2, "index")
    else:
        return None
    return (source, slot) if type(slot) is int and slot >= 0 and rows in (slice(None), Ellipsis) else None


def _reduce(node: fx.Node) -> Fact | None:
    """`sum` or `any` over tokens and slots.

    Of a one-hot tensor it counts the tokens of each class; of a mask, those of one expert.
    """
    if not node.kwargs.keys() <= {"input", "dim", "keepdim"}:
        return None
    inner, dims = fact(arg(node, 0, "input")), _reduced_dims(node)
    if inner is None and op_name(node) == "sum":
        return _counted_table(node)
    if isinstance(inner, Mask) and dims is None:
        return Occupied(inner)
    if not isinstance(inner, (OneHot, Mask)) or dims is None or arg(node, 2, "keepdim", False):
        return None
    kept = tuple(label for at, label in enumerate(inner.dims) if at not in dims and at - len(inner.dims) not in dims)
    if [label for label in inner.dims if label not in kept] == ["K"]:
        return replace(inner, dims=kept, reduced=True)
    if kept != ("E",) or isinstance(inner, Mask):
        return None
    return Counts(inner.ids, inner.num_classes, positive=op_name(node) == "any", reduced=inner.reduced)


def chosen(index: Any) -> tuple[Mask, str] | None:
    """The mask behind an index that picks the tokens ("T") or slots ("N") of one expert: positions, or the mask."""
    known, value = fact(index), fake_tensor(index)
    if isinstance(known, Rows):
        return (known.mask, known.axis) if known.axis in ("T", "N") else None
    if not isinstance(known, Mask) or value is None or value.dtype != torch.bool:
        return None
    return (known, known.dims[0]) if known.dims in (("T",), ("N",)) else None


def selected(node: Any) -> Mask | None:
    """The mask of whose slots `node` holds the positions, or something of each."""
    known = fact(node)
    if isinstance(known, (Rows, Selection)):
        return known.mask
    if not isinstance(node, fx.Node) or op_name(node) != "getitem":
        return None
    source = fact(node.args[0])
    if isinstance(source, Selection) and fake_tensor(node) is not None:
        return source.mask
    index, value = fact(node.args[1]), fake_tensor(node.args[1])
    if isinstance(index, Mask):
        return index if value is not None and value.dtype == torch.bool else None
    return index.mask if isinstance(index, Rows) else None


def chosen_tokens(index: Any) -> Mask | None:
    """The mask behind an index that picks the tokens of one expert."""
    found = chosen(index)
    return found[0] if found is not None and found[1] == "T" else None


def counts_behind(node: fx.Node) -> Counts | None:
    """The counts of which `node` is one, as a Python number, or how many there are."""
    known = fact(node.args[0]) if node.target in (expert_count, experts_hit, torch.ops.aten.sym_size.int) else None
    return known if isinstance(known, Counts) else None


def _argmax(node: fx.Node) -> Fact | None:
    """`(ids == e).int().argmax(-1)`."""
    inner, dim = fact(arg(node, 0, "input")), arg(node, 1, "dim")
    if not isinstance(inner, Mask) or inner.dims != ("T", "K") or dim not in (1, -1) or arg(node, 2, "keepdim", False):
        return None
    return SlotOf(inner)


def _bincount(node: fx.Node) -> Fact | None:
    ids, classes = arg(node, 0, "input"), arg(node, 2, "minlength", 0)
    if arg(node, 1, "weights") is not None or type(classes) is not int or ids_dims(ids) != ("T",):
        return None
    flat = _flat_ids(ids) or ids
    if classes > 0:
        return Counts(flat, classes)
    columns = num_columns(flat)
    return Counts(flat, columns, open_ended=True) if columns is not None else None


def _histc(node: fx.Node) -> Fact | None:
    """With E bins from 0 to E - 1 the bin of expert e is [e, e + 1) (E - 1) / E: it holds the integer e alone."""
    bins, low, high = arg(node, 1, "bins", 100), arg(node, 2, "min", 0), arg(node, 3, "max", 0)
    values = arg(node, 0, "input")
    if op_name(values) in ("float", "to", "double") and known_tensor(values).dtype.itemsize >= _EXACT_BYTES:
        values = values.args[0]
    if type(bins) is not int or bins < 2 or low != 0 or high != bins - 1 or ids_dims(values) is None:
        return None
    return Counts(_flat_ids(values) or values, bins)


def _cumsum(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    if not isinstance(inner, Counts) or inner.positive or inner.cumulative or arg(node, 1, "dim") not in (0, -1):
        return None
    return replace(inner, cumulative=True) if known_tensor(node).dtype in (torch.int32, torch.int64) else None


def _counted_table(total: fx.Node) -> Counts | None:
    """`table.sum(0)` of `table = zeros(T, E).scatter(1, ids, 1)`, or of zeros that were filled so in place."""
    table = arg(total, 0, "input")
    while op_name(table) in ("to", "long", "int") and len(table.args) > 0:
        table = table.args[0]
    if not isinstance(table, fx.Node) or _reduced_dims(total) not in ((0,), (-2,)):
        return None
    writers = [writer for writer in writers_of(storage_of(table)) if writer < total]
    marked = writers[0] if op_name(table) in ZEROS and len(writers) == 1 else table
    if op_name(marked) not in ("scatter", "scatter_") or (marked is table and writers):
        return None
    zeros, dim, ids, one = (arg(marked, at, name) for at, name in enumerate(("input", "dim", "index", "value")))
    size = known_tensor(zeros).shape
    if any(writer < marked for writer in writers_of(storage_of(zeros))):
        return None
    is_table = op_name(zeros) in ZEROS and len(size) == 2 and type(size[1]) is int and ids_dims(ids) == ("T", "K")
    if not is_table or dim not in (1, -1) or one != 1 or "reduce" in marked.kwargs or len(marked.args) > 4:
        return None
    return Counts(ids, size[1], reduced=True) if same_size(size[0], known_tensor(ids).shape[0]) else None


def _reduced_dims(node: fx.Node) -> Sequence[int] | None:
    dim = arg(node, 1, "dim")
    if dim is None:
        return None
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _greater(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    if isinstance(inner, Counts) and inner.may_be_hits and arg(node, 1, "other") == 0:
        return replace(inner, positive=True)
    if isinstance(inner, (OneHot, Mask)) and arg(node, 1, "other") == 0:
        return inner
    return None


def _nonzero(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    as_tuple = bool(node.kwargs.get("as_tuple", False))
    if isinstance(inner, Counts) and (inner.positive or inner.may_be_hits):
        return Hit(inner.ids, inner.num_classes) if not as_tuple else None
    if isinstance(inner, OneHot):
        return Listed(inner) if as_tuple and not inner.reduced else None
    return Selection(inner, as_tuple) if isinstance(inner, Mask) else None


def _unbind(node: fx.Node) -> Fact | None:
    """`mask.nonzero().unbind(-1)`: its columns."""
    inner = fact(arg(node, 0, "input"))
    if isinstance(inner, Selection) and not inner.as_tuple and arg(node, 1, "dim", 0) in (1, -1):
        return replace(inner, as_tuple=True)
    return None


def _where(node: fx.Node) -> Fact | None:
    if len(node.args) + len(node.kwargs) != 1:
        return None
    inner = fact(arg(node, 0, "condition"))
    if isinstance(inner, OneHot):
        return Listed(inner) if not inner.reduced else None
    return Selection(inner, as_tuple=True) if isinstance(inner, Mask) else None


def _flatten(node: fx.Node) -> Fact | None:
    """`hit.squeeze(-1)`, `hit.flatten()`, `hit.view(-1)`: still the classes that occur; so for positions."""
    inner, value = fact(arg(node, 0, "input")), fake_tensor(node)
    if isinstance(inner, Kept):
        return _by_token(node, inner)
    if value is None or value.dim() != 1:
        return _squeeze(node) if op_name(node) == "squeeze" else None
    if isinstance(inner, Selection) and not inner.as_tuple and inner.mask.dims in (("T",), ("N",)):
        return Rows(inner.mask, inner.mask.dims[0])
    if isinstance(inner, Hit):
        return inner
    return _squeeze(node) if op_name(node) == "squeeze" else None


def _product(node: fx.Node) -> Fact | None:
    """`one_hot(ids, E) * mask`: the classes of what is kept."""
    tensor = fake_tensor(node)
    if tensor is None or len(node.args) != 2 or node.kwargs:
        return None
    for one_hot, mask in (node.args, node.args[::-1]):
        inner, before = fact(one_hot), fake_tensor(one_hot)
        if isinstance(inner, OneHot) and (inner.dims[-1] != "E" or inner.reduced):
            return None
        if isinstance(inner, (OneHot, Kept)) and _is_zero_or_one(mask) and before is not None:
            return Kept(inner.num_classes) if tensor.shape == before.shape else None
    return None


def _is_zero_or_one(node: Any) -> bool:
    tensor = fake_tensor(node)
    if tensor is None or tensor.dtype == torch.bool:
        return tensor is not None
    return op_name(node) in ("to", "int", "long", "float") and _is_zero_or_one(arg(node, 0, "input"))


def _by_token(node: fx.Node, inner: Kept) -> Fact | None:
    """`kept.view(-1, 1, E)`, `kept.view(-1, E)`."""
    tensor = fake_tensor(node)
    if tensor is None or tensor.dim() not in (2, 3) or not keeps_last_dim(node):
        return None
    if tensor.dim() == 3 and not same_size(tensor.shape[1], 1):
        return None
    dims = ("T", "K")[: tensor.dim() - 1]
    return OneHot(rows_as_ids(node.args[0], len(dims)), inner.num_classes, (*dims, "E"))


def _detach(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    return inner if isinstance(inner, (Hit, Rows)) else None


def _view_as(node: fx.Node) -> Fact | None:
    """`x.view_as(x)` is what Dynamo makes of `x.numpy()`."""
    inner = fact(node.args[0])
    return inner if isinstance(inner, Counts) and node.args[0] is node.args[1] else None


_RULES = {
    "one_hot": _one_hot,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "getattr": _transpose,
    "swapaxes": _transpose,
    "getitem": _getitem,
    "squeeze": _flatten,
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    "unsqueeze": _unsqueeze,
    "mul": _product,
    "multiply": _product,
    "eq": _eq,
    "sum": _reduce,
    "any": _reduce,
    "count_nonzero": _reduce,
    "bincount": _bincount,
    "histc": _histc,
    "cumsum": _cumsum,
    "cpu": _cast,
    "argmax": _argmax,
    **dict.fromkeys("floordiv floor_divide div divide mod remainder fmod".split(), _divide),
    "gt": _greater,
    "greater": _greater,
    "ne": _greater,
    "nonzero": _nonzero,
    "unbind": _unbind,
    "where": _where,
    "to": _cast,
    "bool": _cast,
    "int": _cast,
    "long": _cast,
    "float": _cast,
    "contiguous": _same,
    "clone": _same,
    "detach": _detach,
    "view_as": _view_as,
}
