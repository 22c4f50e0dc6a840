"""What stands at each dim of a tensor that is a rearranged view or a repetition of another.

Code that computes on all pairs of tokens and experts at once first brings its inputs into shape: x.unsqueeze(1),
x.repeat_interleave(K, 0), x[arange(T).repeat(E)], weights.reshape(-1), table.transpose(0, 1)[..., None]. `views_of`
takes these steps back. Each answer has the tensor they started from and, for each dim of `node`, a tuple:

    (i,)        dim i of the start
    (i, j)      dims i and j, flattened
    ()          nothing: the dim has size one, or repeats
    ("r", i)    dim i, each entry repeated in place (repeat_interleave)
    ("t", i)    dim i, repeated as a whole (repeat)
    ("outer", i), ("inner", i)    dim i, cut in two

A dim that was made by indexing with the experts of rows is ("p", label): the row's own expert.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.numbering import numbers_rows
from fx_passes.graph.ops import (
    arg,
    casts_nothing,
    fake_tensor,
    is_inplace,
    normalized_dim,
    op_name,
    same_size,
    same_sizes,
    sizes_of,
    swaps_last_dims,
    varargs,
)

Dim = tuple[Any, ...]


@dataclass(frozen=True)
class View:
    """`steps` are the nodes between `start` and the node in question."""

    start: fx.Node
    dims: tuple[Dim, ...]
    steps: tuple[fx.Node, ...] = ()


def views_of(node: Any) -> tuple[View, ...]:
    """All views that `node` is: first the one with the longest way from its start, last that of itself."""
    tensor = fake_tensor(node)
    if tensor is None:
        return ()
    source = arg(node, 0, "input") if op_name(node) in _RULES else None
    moved = (step(node, view) for view in views_of(source))
    return (*(view for view in moved if view is not None), View(node, tuple((dim,) for dim in range(tensor.dim()))))


def is_transposed(node: fx.Node) -> bool:
    """Whether `node` is a matrix with its two dims swapped."""
    return any(view.steps == (node,) and view.dims == ((1,), (0,)) for view in views_of(node))


def step(node: fx.Node, inner: View) -> View | None:
    """The view that `node` is where its input is `inner`; None where `node` does more than moving dims."""
    rule = _RULES.get(op_name(node) or "")
    dims = rule(node, inner) if rule is not None and not is_inplace(node) else None
    return View(inner.start, dims, (*inner.steps, node)) if dims is not None else None


def _unsqueeze(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    dim = normalized_dim(arg(node, 1, "dim"), len(inner.dims) + 1)
    return (*inner.dims[:dim], (), *inner.dims[dim:])


def _getitem(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    """None, `:` and `...` in any order; or the numbers of rows."""
    index = node.args[1]
    if isinstance(index, fx.Node):
        return _picked(index, inner, sizes_of(node.args[0])[:1])
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is not None and item is not Ellipsis and item != slice(None) for item in items):
        return None
    kept = sum(item == slice(None) for item in items if item is not None)
    missing = [slice(None)] * (len(inner.dims) - kept)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    left = iter(inner.dims)
    return tuple(() if item is None else next(left) for item in [*items[:at], *missing, *items[at + 1 :]])


def _index_select(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    is_first = arg(node, 1, "dim") == 0
    return _picked(arg(node, 2, "index"), inner, sizes_of(arg(node, 0, "input"))[:1]) if is_first else None


def _gather(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    """`x.gather(0, numbers[:, None].expand(-1, D))`: whole rows."""
    index, before = arg(node, 2, "index"), sizes_of(arg(node, 0, "input"))
    is_first = arg(node, 1, "dim") == 0 and set(node.kwargs) <= {"input", "dim", "index"}
    if not is_first or not same_sizes(sizes_of(index)[1:], before[1:]):
        return None
    return _picked(index, inner, before)


def _picked(index: Any, inner: View, rows: tuple[int | torch.SymInt, ...]) -> tuple[Dim, ...] | None:
    """Rows by `index`, which has as many dims as `rows` has sizes, the first of them the number of rows."""
    repeated = repeated_numbers(index, rows[0]) if len(sizes_of(index)) == len(rows) else None
    if repeated is None or len(inner.dims[0]) != 1:
        return None
    return ((*repeated[:-1], *inner.dims[0]), *inner.dims[1:])


def repeated_numbers(index: Any, count: int | torch.SymInt) -> Dim | None:
    """The first dim of `index`, where that holds the numbers of `count` rows: (0,), ("r", 0) or ("t", 0)."""
    views = (view for view in views_of(index) if numbers_rows(view.start, count))
    dims = next((view.dims for view in views), ((),))
    return dims[0] if dims[0] and not any(dims[1:]) else None


def numbers_tokens_of_slots(node: Any, tokens: int | torch.SymInt, slots: int | torch.SymInt) -> bool:
    """Whether `node` has the token of each slot: `arange(T).repeat_interleave(K)`, and stays that."""
    views = [view for view in views_of(node) if view.dims == (("r", 0),) and numbers_rows(view.start, tokens)]
    return any(not any(map(any, map(writers_of, view.steps))) for view in views) and same_size(sizes_of(node)[0], slots)


def _permute(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    dims = [normalized_dim(dim, len(inner.dims)) for dim in varargs(node, 1, "dims")]
    return tuple(inner.dims[dim] for dim in dims)


def _transpose(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    dims = list(inner.dims)
    first, second = (arg(node, 1, "dim0"), arg(node, 2, "dim1")) if op_name(node) != "t" else (0, 1)
    if len(dims) < 2:
        return None
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


def _getattr(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    swapped = (*inner.dims[:-2], *reversed(inner.dims[-2:]))
    return swapped if swaps_last_dims(node, len(inner.dims)) else None


def _expand(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    before, after = sizes_of(node.args[0]), sizes_of(node)
    new = len(after) - len(before)
    kept = [dim if same_size(old, size) else () for dim, old, size in zip(inner.dims, before, after[new:], strict=True)]
    return ((),) * new + tuple(kept)


def _repeat_interleave(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    times, dim = arg(node, 1, "repeats"), arg(node, 2, "dim")
    along_rows = dim == 0 or (dim is None and len(inner.dims) == 1)
    if type(times) is not int or not along_rows or len(inner.dims[0]) != 1:
        return None
    return (("r", *inner.dims[0]), *inner.dims[1:])


def _repeat(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    times = varargs(node, 1, "repeats")
    if len(times) != len(inner.dims):
        return None
    rest = zip(times[1:], inner.dims[1:], strict=True)
    if any(time != 1 and dim for time, dim in rest) or (times[0] != 1 and len(inner.dims[0]) != 1):
        return None
    first = inner.dims[0] if times[0] == 1 else ("t", *inner.dims[0])
    return (first, *inner.dims[1:])


def _reshape(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    """Dims of size one come and go, two are flattened, one is cut in two, a repeated one falls into its two."""
    before, after = list(sizes_of(node.args[0])), list(sizes_of(node))
    if fake_tensor(node) is None or _dtype(node) != _dtype(node.args[0]):
        return None
    dims: list[Dim] = []
    old = [(size, dim) for size, dim in zip(before, inner.dims, strict=True) if not same_size(size, 1)]
    for size in after:
        if same_size(size, 1):
            dims.append(())
        elif old and same_size(size, old[0][0]):
            dims.append(old.pop(0)[1])
        elif len(old) >= 2 and same_size(size, old[0][0] * old[1][0]):
            merged = _merged(old[0][1], old[1][1])
            if merged is None:
                return None
            dims.append(merged)
            del old[:2]
        elif old and old[0][1][:1] in (("r",), ("t",)):
            repeated, kind, source = old[0][0], old[0][1][0], old[0][1][1]
            rest = _next(after, dims)
            length = rest if kind == "t" else size
            if not same_size(length, sizes_of(inner.start)[source]) or not same_size(size * rest, repeated):
                return None
            first, second = ((), (source,)) if kind == "t" else ((source,), ())
            dims.append(first)
            old[0] = (rest, second)
        elif old and len(old[0][1]) == 1 and same_size(size * _next(after, dims), old[0][0]):
            dims.append(("outer", *old[0][1]))
            old[0] = (_next(after, dims[:-1]), ("inner", *old[0][1]))
        else:
            return None
    return tuple(dims) if not old else None


def _next(sizes: list[int | torch.SymInt], dims: list[Dim]) -> int | torch.SymInt:
    """The size after that of the dim which follows `dims`."""
    return sizes[len(dims) + 1] if len(dims) + 1 < len(sizes) else 1


def _merged(first: Dim, second: Dim) -> Dim | None:
    if first == () and len(second) == 1:
        return ("t", *second)
    if second == () and len(first) == 1:
        return ("r", *first)
    return (*first, *second) if len(first) == len(second) == 1 else None


def _dtype(node: Any) -> torch.dtype | None:
    tensor = fake_tensor(node)
    return tensor.dtype if tensor is not None else None


def _same(_node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    return inner.dims


def _to(node: fx.Node, inner: View) -> tuple[Dim, ...] | None:
    return inner.dims if casts_nothing(node) else None


_RULES = {
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "index_select": _index_select,
    "gather": _gather,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "t": _transpose,
    "getattr": _getattr,
    "expand": _expand,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "contiguous": _same,
    "to": _to,
}
