"""One-hot tensors and masks: what is equal to an expert's number, and what moves the dims of that.

T tokens, K experts per token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fx_passes.facts.ids import ids_are_distinct, ids_dims, is_single_choice, rows_as_ids
from fx_passes.facts.statements import (
    TOKENS_BY_BATCH,
    Fact,
    Kept,
    Listed,
    ListedMask,
    Mask,
    OneHot,
    OwnIds,
    with_one_token_dim,
)
from fx_passes.graph.markers import Expert, expert_of, experts_of_each
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import (
    FLATTENING,
    arg,
    attribute,
    fake_tensor,
    keeps_last_dim,
    known_tensor,
    normalized_dim,
    only_pick,
    op_name,
    same_size,
    sizes_of,
    squeezes_nothing,
    start_of_one,
    varargs,
)
from fx_passes.graph.views import views_of


def _one_hot(node: fx.Node, _inner: Fact | None) -> Fact | None:
    ids, classes = arg(node, 0, "input"), arg(node, 1, "num_classes", -1)
    dims = ids_dims(ids) if isinstance(ids, fx.Node) else None
    if dims is None or not isinstance(classes, int) or classes <= 0:
        return None
    flat = flat_ids(ids)
    return OneHot(flat, classes, ("N", "E")) if flat is not None else OneHot(ids, classes, (*dims, "E"))


def _same(_node: fx.Node, inner: Fact | None) -> Fact | None:
    return inner


def permute(node: fx.Node, inner: Fact | None) -> Fact | None:
    order = varargs(node, 1, "dims")
    if not isinstance(inner, (OneHot, Mask)) or len(order) != len(inner.dims):
        return None
    return replace(inner, dims=tuple(inner.dims[dim] for dim in order))


def transpose(node: fx.Node, inner: Fact | None) -> Fact | None:
    name = op_name(node)
    if not isinstance(inner, (OneHot, Mask)) or (
        name == "getattr" and (attribute(node) != "T" or len(inner.dims) != 2)
    ):
        return None
    dims = list(inner.dims)
    if len(dims) < 2:
        return inner
    first, second = (arg(node, 1, "dim0"), arg(node, 2, "dim1")) if name in ("transpose", "swapaxes") else (0, 1)
    dims[first], dims[second] = dims[second], dims[first]
    return replace(inner, dims=tuple(dims))


def index_one_hot(one_hot: OneHot, index: Any) -> Fact | None:
    """`mask[e]`, `mask[..., e]`, `mask[:, :, e]`, `mask[e:e+1]` with a Python int e."""
    items = index if isinstance(index, tuple) else (index,)
    pick = only_pick(items, len(one_hot.dims))
    if pick is None:
        return None
    dim, item = pick
    if type(item) is int:
        return select(one_hot, dim, item, keepdim=False)
    start = start_of_one(item)
    return select(one_hot, dim, start, keepdim=True) if start is not None else None


def select(inner: Fact | None, dim: Any, expert: Expert | None, keepdim: Any) -> Fact | None:
    inner = as_one_hot(inner)
    if not isinstance(inner, OneHot) or expert is None or inner.dims[dim] != "E":
        return None
    if type(expert) is int and not 0 <= expert < inner.num_classes:
        return None
    if (experts_of_each(expert) or 0) > inner.num_classes:
        return None
    dims = (*inner.dims[:dim], *(("1",) if keepdim else ()), *inner.dims[dim + 1 :])
    return Mask(inner.ids, expert, dims, reduced=inner.reduced)


def squeeze(node: fx.Node, inner: Fact | None) -> Fact | None:
    dim = arg(node, 1, "dim")
    if not isinstance(inner, Mask) or not isinstance(dim, int):
        return None
    dim = normalized_dim(dim, len(inner.dims))
    if squeezes_nothing(node):
        return inner
    left = inner.dims[:dim] + inner.dims[dim + 1 :]
    if inner.dims[dim] == "K" and is_single_choice(inner.ids):
        return replace(inner, dims=left, reduced=True)
    return replace(inner, dims=left) if inner.dims[dim] == "1" else None


def _unsqueeze(node: fx.Node, inner: Fact | None) -> Fact | None:
    dim = arg(node, 1, "dim")
    if not isinstance(inner, Mask) or not isinstance(dim, int):
        return None
    dim = normalized_dim(dim, len(inner.dims) + 1)
    return replace(inner, dims=(*inner.dims[:dim], "1", *inner.dims[dim:]))


def with_new_dims(mask: Mask, index: Any) -> Fact | None:
    """`mask[:, None]`, `mask[..., None]`."""
    items = list(index) if isinstance(index, tuple) else [index]
    if items.count(Ellipsis) == 1:
        at, missing = items.index(Ellipsis), len(mask.dims) - items.count(slice(None))
        items[at : at + 1] = [slice(None)] * missing
    if any(item is not None and item != slice(None) for item in items):
        return None
    left = list(mask.dims)
    dims = tuple("1" if item is None else left.pop(0) for item in items)
    return replace(mask, dims=(*dims, *left))


def _eq(node: fx.Node, inner: Fact | None) -> Fact | None:
    """`ids == e`, `ids.unsqueeze(-1) == torch.arange(E)`, and `one_hot[...] == 1`."""
    left, right = arg(node, 0, "input"), arg(node, 1, "other")
    if isinstance(inner, (OneHot, Mask)) and right == 1:
        return inner if not inner.reduced or is_single_choice(inner.ids) or ids_are_distinct(inner.ids) else None
    expert = expert_of(right)
    if expert is None and fake_tensor(right) is not None:
        return _compared_with_all(left, right)
    if expert is None and type(right) is int:
        expert = right
    if not isinstance(left, fx.Node) or expert is None or op_name(left) == "one_hot":
        return None
    if isinstance(inner, Listed):
        return ListedMask(inner.one_hot, expert) if inner.axis == "E" else None
    if isinstance(inner, OwnIds):
        return Mask(inner.mask.ids, expert, ("R", "K")) if inner.mask.expert == expert else None
    column = column_of_ids(left)
    if column is not None:
        dims = (ids_dims(column[0]) or ())[:-1]
        is_flat = len(sizes_of(left)) < len(dims)
        return Mask(column[0], expert, with_one_token_dim(dims) if is_flat else dims, slot=column[1])
    flat = flat_ids(left)
    if flat is not None:
        return Mask(flat, expert, ("N",))
    dims = ids_dims(left)
    return Mask(left, expert, dims) if dims else None


def _compared_with_all(left: Any, right: Any) -> Fact | None:
    """`ids[..., None] == torch.arange(E)`, which may have dims of size one before its own."""
    counted = next((view for view in views_of(right) if view.dims[-1:] == ((0,),) and not any(view.dims[:-1])), None)
    if counted is None:
        return None
    classes = known_tensor(right).shape[-1]
    if type(classes) is not int or not numbers_rows(counted.start, classes):
        return None
    for view in views_of(left):
        dims = ids_dims(view.start)
        if dims is None or known_tensor(right).dim() > len(view.dims):
            continue
        if view.dims == (*((dim,) for dim in range(len(dims))), ()):
            return OneHot(view.start, classes, (*dims, "E"))
        if dims == ("T", "K") and view.dims == ((0, 1), ()):
            return OneHot(view.start, classes, ("N", "E"))
    return None


def flat_ids(node: fx.Node) -> fx.Node | None:
    """ids where `node` is `ids.view(-1)`, with more than one slot a token."""
    source = arg(node, 0, "input")
    if op_name(node) not in FLATTENING or not isinstance(source, fx.Node):
        return None
    is_flat = (ids_dims(source) or ("T",))[-1] == "K" and ids_dims(node) == ("T",)
    return source if is_flat and not is_single_choice(source) else None


def column_of_ids(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(ids, k) where `node` is `ids[:, k]`, or `ids[..., k].reshape(-1)`: all tokens in one dim."""
    source = arg(node, 0, "input")
    if op_name(node) in FLATTENING and fake_tensor(source) is not None:
        is_flat = len(sizes_of(node)) == 1 and known_tensor(node).dtype == known_tensor(source).dtype
        return column_of_ids(source) if is_flat else None
    dims = ids_dims(source) if isinstance(source, fx.Node) else None
    if dims is None or dims[-1] != "K":
        return None
    if op_name(node) == "getitem" and isinstance(node.args[1], tuple):
        pick = only_pick(node.args[1], len(dims))
    elif op_name(node) == "select":
        pick = normalized_dim(arg(node, 1, "dim"), len(dims)), arg(node, 2, "index")
    else:
        return None
    if pick is None or pick[0] != len(dims) - 1:
        return None
    return (source, pick[1]) if type(pick[1]) is int and pick[1] >= 0 else None


def _is_zero_or_one(node: Any) -> bool:
    tensor = fake_tensor(node)
    if tensor is None or tensor.dtype == torch.bool:
        return tensor is not None
    return op_name(node) in ("to", "int", "long", "float") and _is_zero_or_one(arg(node, 0, "input"))


def product(node: fx.Node, one_hot: Any, inner: OneHot | Kept, mask: Any) -> Fact | None:
    """`one_hot(ids, E) * mask`: the classes of what is kept."""
    after, before = fake_tensor(node), fake_tensor(one_hot)
    if isinstance(inner, OneHot) and (inner.dims[-1] != "E" or inner.reduced):
        return None
    if before is None or after is None or after.shape != before.shape or not _is_zero_or_one(mask):
        return None
    kept = Kept(inner.num_classes, node)
    has_a_choice = isinstance(inner, OneHot) and inner.dims[:-1] == ("T", "K") and is_single_choice(inner.ids)
    return _of_one_choice(kept) if has_a_choice else kept


def _of_one_choice(kept: Kept) -> OneHot:
    """What is kept, where `kept` or a view of it is [T, 1, E]."""
    return OneHot(rows_as_ids(kept.node, ("T", "K")), kept.num_classes, ("T", "K", "E"))


def as_one_hot(inner: Fact | None) -> Fact | None:
    """What is kept of tokens in one dim or in two, as a one-hot tensor; anything else is what it was."""
    rank = known_tensor(inner.node).dim() if isinstance(inner, Kept) else 0
    if not isinstance(inner, Kept) or rank not in (2, 3):
        return inner
    dims = ("T",) if rank == 2 else TOKENS_BY_BATCH
    return OneHot(rows_as_ids(inner.node, dims), inner.num_classes, (*dims, "E"), reduced=rank == 3)


def by_token(node: fx.Node, inner: Kept) -> Fact | None:
    """`kept.view(-1, 1, E)`, `kept.view(-1, E)`."""
    tensor = fake_tensor(node)
    if tensor is None or tensor.dim() not in (2, 3) or not keeps_last_dim(node):
        return None
    if tensor.dim() == 3 and same_size(tensor.shape[1], 1):
        return _of_one_choice(inner)
    whole = as_one_hot(inner) if tensor.dim() == 2 else None
    return replace(whole, dims=("T", "E")) if isinstance(whole, OneHot) else None


RULES: dict[str, Callable[[fx.Node, Fact | None], Fact | None]] = {
    "one_hot": _one_hot,
    "unsqueeze": _unsqueeze,
    "eq": _eq,
    "contiguous": _same,
    "clone": _same,
}
