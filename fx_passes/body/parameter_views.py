"""Views of parameters: part of one, its dims in another order or cut up in another way, each as a step.

W[e][:F]    W[e, F:]    W[e].chunk(2)[0]    W.t()    W.view(E, F, D)    W.unbind(0)[e]    W[1, e]
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx

from fx_passes.body.view_steps import Cut, Index, Item, Permute, Reshape, Step
from fx_passes.graph.markers import expert_of, index_with_expert, select_expert
from fx_passes.graph.ops import (
    arg,
    example,
    fake_tensor,
    known_tensor,
    normalized_dim,
    op_name,
    swaps_last_dims,
    varargs,
)


class Viewed(NamedTuple):
    operand: fx.Node
    step: Step


def viewed(node: Any) -> Viewed | None:
    """The step that `node` is, from a tensor of fixed sizes; None where it is anything else than a view."""
    if not isinstance(node, fx.Node):
        return None
    source = arg(node, 0, "input")
    if op_name(node) == "getitem" and op_name(source) in _PARTS:
        return _part(source, node.args[1])
    sizes = _fixed_sizes(source)
    rule = _RULES.get(node.target if node.target in (select_expert, index_with_expert) else op_name(node))
    step = rule(node, sizes) if rule is not None and sizes is not None and fake_tensor(node) is not None else None
    return Viewed(source, step) if step is not None else None


def _fixed_sizes(node: Any) -> tuple[int, ...] | None:
    tensor = fake_tensor(node)
    is_fixed = tensor is not None and all(type(size) is int for size in tensor.shape)
    return tuple(tensor.shape) if tensor is not None and is_fixed else None


def _select_expert(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    expert, dim, keepdim = expert_of(node.args[1]), arg(node, 2, "dim"), node.args[3]
    new = (None,) if keepdim else ()
    return None if expert is None else Index((*_all(sizes[:dim]), expert, *new, *_all(sizes[dim + 1 :])))


def _all(sizes: Sequence[int]) -> tuple[Cut, ...]:
    return tuple(Cut(0, size) for size in sizes)


def _getitem(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    items = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    used = sum(item is not None and item is not Ellipsis for item in items)
    if any(isinstance(item, (list, tuple)) for item in items) or used > len(sizes):
        return None
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(sizes) - used)
    left = iter(sizes)
    own = [None if item is None else _item(item, next(left), node) for item in items]
    known = all(item is None or new is not None for item, new in zip(items, own, strict=True))
    return Index(tuple(own)) if known else None


def _item(item: Any, size: int, node: fx.Node) -> Item:
    """What `item` of an index takes of a dim; None where that is not known."""
    if type(item) is int:
        return item % size if -size <= item < size else None
    if isinstance(item, slice):
        numbers = (item.start, item.stop, item.step)
        is_known = all(number is None or type(number) is int for number in numbers) and (item.step or 1) > 0
        return _cut(*item.indices(size)) if is_known else None
    return expert_of(item) if node.target is index_with_expert else None


def _cut(start: int, stop: int, step: int) -> Cut:
    return Cut(start, max(start, stop), step)


def _one_dim(node: fx.Node, sizes: tuple[int, ...], new: Callable[[int], Item]) -> Index | None:
    dim = arg(node, 1, "dim")
    if type(dim) is not int:
        return None
    dim = normalized_dim(dim, len(sizes))
    item = new(sizes[dim])
    return Index((*_all(sizes[:dim]), item, *_all(sizes[dim + 1 :]))) if item is not None else None


def _select(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    return _one_dim(node, sizes, lambda size: _item(arg(node, 2, "index"), size, node))


def _narrow(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    start, length = arg(node, 2, "start"), arg(node, 3, "length")
    if type(start) is not int or type(length) is not int:
        return None
    return _one_dim(node, sizes, lambda size: _cut(*slice(start % size, start % size + length).indices(size)))


def _squeeze(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    return _one_dim(node, sizes, lambda size: 0 if size == 1 else None)


def _unsqueeze(node: fx.Node, sizes: tuple[int, ...]) -> Index | None:
    dim = arg(node, 1, "dim")
    dim = normalized_dim(dim, len(sizes) + 1)
    return Index((*_all(sizes[:dim]), None, *_all(sizes[dim:])))


def _part(parts: fx.Node, number: Any) -> Viewed | None:
    """`W.chunk(2)[0]`, `W.split(F)[0]`, `W.unbind(0)[0]`."""
    source, values = arg(parts, 0, "input"), example(parts)
    sizes, name = _fixed_sizes(source), op_name(parts)
    dim = arg(parts, 1 if name == "unbind" else 2, "dim", 0)
    if sizes is None or type(number) is not int or type(dim) is not int or not isinstance(values, (tuple, list)):
        return None
    dim, number = normalized_dim(dim, len(sizes)), number % len(values)
    widths = [value.shape[dim] for value in values] if name != "unbind" else []
    start = sum(widths[:number])
    item = number if name == "unbind" else Cut(start, start + widths[number])
    return Viewed(source, Index((*_all(sizes[:dim]), item, *_all(sizes[dim + 1 :]))))


def _permute(node: fx.Node, sizes: tuple[int, ...]) -> Permute | None:
    return Permute(tuple(normalized_dim(dim, len(sizes)) for dim in varargs(node, 1, "dims")))


def _transpose(node: fx.Node, sizes: tuple[int, ...]) -> Permute | None:
    name, rank = op_name(node), len(sizes)
    if rank < 2 or (name == "getattr" and not swaps_last_dims(node, rank)):
        return None
    given = varargs(node, 1, "dims") if name not in ("t", "getattr") else (-2, -1)
    first, second = (normalized_dim(dim, rank) for dim in given)
    dims = list(range(rank))
    dims[first], dims[second] = second, first
    return Permute(tuple(dims))


def _reshape(node: fx.Node, _sizes: tuple[int, ...]) -> Reshape | None:
    """Where it copies nothing."""
    sizes = _fixed_sizes(node)
    shares = op_name(node) == "view" or known_tensor(node.args[0]).is_contiguous()
    keeps_dtype = known_tensor(node).dtype == known_tensor(node.args[0]).dtype
    return Reshape(sizes) if sizes is not None and shares and keeps_dtype else None


_PARTS = frozenset(("chunk", "split", "tensor_split", "unbind"))
_RULES: dict[Any, Callable[[fx.Node, tuple[int, ...]], Step | None]] = {
    select_expert: _select_expert,
    index_with_expert: _getitem,
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    **dict.fromkeys("transpose swapaxes swapdims t getattr".split(), _transpose),
    **dict.fromkeys("reshape view flatten unflatten".split(), _reshape),
}
