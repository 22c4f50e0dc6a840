"""What routing tensors mean.

A naive MoE loop hides its routing in tensor algebra: one_hot, permute, sum, `> 0`, nonzero, where. `fact(node)` reads
that algebra back and answers with a statement, or None where it knows nothing:

    OneHot   value[..., t, ..., k, ..., c] == 1 exactly where ids[t, k] == c
    Mask     value[..., t, ..., k] is true exactly where ids[t, k] == expert
    Hit      value[c] is true exactly where class c occurs in ids
    Rows     the token or slot positions of the slots of one expert, each once

T tokens, K experts per token. A dim is labelled "T", "K", "E" (classes) or "1" (size one).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fx_passes.markers import Expert, expert_of, index_list, select_expert
from fx_passes.ops import arg, fake_tensor, normalized_dim, op_name, varargs

Dims = tuple[str, ...]


@dataclass(frozen=True)
class OneHot:
    ids: fx.Node
    num_classes: int
    dims: Dims


@dataclass(frozen=True)
class Counts:
    """Tokens per class; `positive` once it was compared with zero (then it is a hit mask)."""

    ids: fx.Node
    num_classes: int
    positive: bool


@dataclass(frozen=True)
class Hit:
    """The classes that occur in ids, ascending, each once: `nonzero()` of a hit mask."""

    ids: fx.Node
    num_classes: int


@dataclass(frozen=True)
class Mask:
    ids: fx.Node
    expert: Expert
    dims: Dims


@dataclass(frozen=True)
class Selection:
    """The tuple of index tensors that `torch.where(mask)` gives, or its columns as one tensor (`as_tuple=False`)."""

    mask: Mask
    as_tuple: bool


@dataclass(frozen=True)
class Rows:
    """For each slot of one expert (in the order of `mask`'s dims) its position along `axis` ("T" or "K")."""

    mask: Mask
    axis: str


@dataclass(frozen=True)
class Occupied:
    """A scalar: how many slots one expert has, or whether it has any."""

    mask: Mask


Fact = OneHot | Counts | Hit | Mask | Selection | Rows | Occupied


def ids_dims(ids: fx.Node) -> Dims | None:
    value = fake_tensor(ids)
    if value is None or value.dtype not in (torch.int64, torch.int32):
        return None
    return {1: ("T",), 2: ("T", "K")}.get(value.dim())


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
    if node.target is index_list:
        return fact(arg(node, 0, "input"))
    rule = _RULES.get(op_name(node) or "")
    return rule(node) if rule else None


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
    return inner if isinstance(inner, (OneHot, Mask)) else None


def _permute(node: fx.Node) -> Fact | None:
    inner, order = fact(arg(node, 0, "input")), varargs(node, 1, "dims")
    if not isinstance(inner, (OneHot, Mask)) or len(order) != len(inner.dims):
        return None
    return replace(inner, dims=tuple(inner.dims[dim] for dim in order))


def _transpose(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    if not isinstance(inner, (OneHot, Mask)):
        return None
    dims = list(inner.dims)
    first, second = (arg(node, 1, "dim0"), arg(node, 2, "dim1")) if op_name(node) != "t" else (0, 1)
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
    return inner if isinstance(inner, Hit) and index == slice(None) else None


def _column(selection: Selection, index: Any) -> Fact | None:
    if not selection.as_tuple:
        if not (isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)):
            return None
        index = index[1]
    if not isinstance(index, int) or not -len(selection.mask.dims) <= index < len(selection.mask.dims):
        return None
    axis = selection.mask.dims[index]
    return Rows(selection.mask, axis) if axis in ("T", "K") else None


def _index_one_hot(one_hot: OneHot, index: Any) -> Fact | None:
    """`mask[e]`, `mask[..., e]`, `mask[:, :, e]`, `mask[e:e+1]` with a Python int e."""
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis in items:
        missing = len(one_hot.dims) - (len(items) - 1)
        at = items.index(Ellipsis)
        items = items[:at] + (slice(None),) * missing + items[at + 1 :]
    chosen = [(dim, item) for dim, item in enumerate(items) if item != slice(None)]
    if len(chosen) != 1:
        return None
    dim, item = chosen[0]
    if type(item) is int:
        return _select(one_hot, dim, item, keepdim=False)
    if isinstance(item, slice) and type(item.start) is int and item.stop == item.start + 1 and item.step in (None, 1):
        return _select(one_hot, dim, item.start, keepdim=True)
    return None


def _select(inner: Fact | None, dim: Any, expert: Expert | None, keepdim: Any) -> Fact | None:
    if not isinstance(inner, OneHot) or expert is None or inner.dims[dim] != "E":
        return None
    if type(expert) is int and not 0 <= expert < inner.num_classes:
        return None
    dims = (*inner.dims[:dim], *(("1",) if keepdim else ()), *inner.dims[dim + 1 :])
    return Mask(inner.ids, expert, dims)


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
    dims = ids_dims(left)
    return Mask(left, expert, dims) if dims else None


def _reduce(node: fx.Node) -> Fact | None:
    """`sum` or `any` over tokens and slots.

    Of a one-hot tensor it counts the tokens of each class; of a mask, those of one expert.
    """
    if not node.kwargs.keys() <= {"input", "dim", "keepdim"}:
        return None
    inner, dims = fact(arg(node, 0, "input")), _reduced_dims(node)
    if isinstance(inner, Mask) and dims is None:
        return Occupied(inner)
    if not isinstance(inner, OneHot) or dims is None:
        return None
    kept = [label for at, label in enumerate(inner.dims) if at not in dims and at - len(inner.dims) not in dims]
    if kept != ["E"] or arg(node, 2, "keepdim", False):
        return None
    return Counts(inner.ids, inner.num_classes, positive=op_name(node) == "any")


def _reduced_dims(node: fx.Node) -> Sequence[int] | None:
    dim = arg(node, 1, "dim")
    if dim is None:
        return None
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _greater(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    if isinstance(inner, Counts) and not inner.positive and arg(node, 1, "other") == 0:
        return replace(inner, positive=True)
    if isinstance(inner, (OneHot, Mask)) and arg(node, 1, "other") == 0:
        return inner
    return None


def _nonzero(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    as_tuple = bool(node.kwargs.get("as_tuple", False))
    if isinstance(inner, Counts):
        return Hit(inner.ids, inner.num_classes) if not as_tuple else None
    return Selection(inner, as_tuple) if isinstance(inner, Mask) else None


def _where(node: fx.Node) -> Fact | None:
    if len(node.args) + len(node.kwargs) != 1:
        return None
    inner = fact(arg(node, 0, "condition"))
    return Selection(inner, as_tuple=True) if isinstance(inner, Mask) else None


def _flatten(node: fx.Node) -> Fact | None:
    """`hit.squeeze(-1)`, `hit.flatten()`, `hit.view(-1)`: still the classes that occur."""
    inner = fact(arg(node, 0, "input"))
    if not isinstance(inner, Hit):
        return _squeeze(node) if op_name(node) == "squeeze" else None
    value = fake_tensor(node)
    return inner if value is not None and value.dim() == 1 else None


def _detach(node: fx.Node) -> Fact | None:
    inner = fact(arg(node, 0, "input"))
    return inner if isinstance(inner, (Hit, Rows)) else None


_RULES = {
    "one_hot": _one_hot,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "getitem": _getitem,
    "squeeze": _flatten,
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    "unsqueeze": _unsqueeze,
    "eq": _eq,
    "sum": _reduce,
    "any": _reduce,
    "count_nonzero": _reduce,
    "gt": _greater,
    "greater": _greater,
    "ne": _greater,
    "nonzero": _nonzero,
    "where": _where,
    "to": _cast,
    "bool": _cast,
    "int": _cast,
    "long": _cast,
    "float": _cast,
    "contiguous": _same,
    "clone": _same,
    "detach": _detach,
}
