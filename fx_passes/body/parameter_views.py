"""Views of parameters: part of one, its dims in another order or cut up in another way.

    W[e][:F]    W[e, F:]    W[e].chunk(2)[0]    W[:, :F][e]    W.unbind(0)[e]    W[1, e]    W[e * F : (e + 1) * F]

Each operation is a step, `Index`, `Permute` or `Reshape`, that can be taken for all experts at once, on the stack of
what they have. A step shares the memory of what it is taken of, so that it may as well be taken later.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import fx

from fx_passes.graph.markers import Expert, expert_of, index_with_expert, select_expert
from fx_passes.graph.ops import arg, example, fake_tensor, known_tensor, normalized_dim, op_name, varargs


class Cut(NamedTuple):
    """Entries of a dim, with `0 <= start <= stop <= size`."""

    start: int
    stop: int
    step: int = 1


Item = int | Cut | None | fx.Node
"""What becomes of a dim: one entry of it, some of them, a new dim, or the entry of an expert without a number."""


@dataclass(frozen=True)
class Index:
    """An item for each dim, and None for each new one."""

    items: tuple[Item, ...]

    def apply(self, call: Callable[..., Any], tensor: Any) -> Any:
        index = tuple(slice(*item) if isinstance(item, Cut) else item for item in self.items)
        return call(operator.getitem, tensor, index)

    def on_stack(self, size: int) -> "Index":
        return Index((Cut(0, size), *self.items))


@dataclass(frozen=True)
class Permute:
    dims: tuple[int, ...]

    def apply(self, call: Callable[..., Any], tensor: Any) -> Any:
        return call(torch.permute, tensor, self.dims)

    def on_stack(self, _size: int) -> "Permute":
        return Permute((0, *(dim + 1 for dim in self.dims)))


@dataclass(frozen=True)
class Reshape:
    sizes: tuple[int, ...]

    def apply(self, call: Callable[..., Any], tensor: Any) -> Any:
        return call(torch.reshape, tensor, self.sizes)

    def on_stack(self, size: int) -> "Reshape":
        return Reshape((size, *self.sizes))


Step = Index | Permute | Reshape


class Viewed(NamedTuple):
    operand: fx.Node
    step: Step


class Chosen(NamedTuple):
    """An expert's entry of `source`: after `steps` the experts lie along dim 0.

    The entry has `leading` dims of size one before those that are left. `nodes` lead to the entries of all experts.
    """

    source: fx.Node
    steps: tuple[Step, ...]
    leading: int
    nodes: frozenset[fx.Node]


def shape_after(tensor: torch.Tensor, steps: Sequence[Step]) -> torch.Size:
    """The shape of `tensor` after `steps`."""
    if not steps:
        return tensor.shape
    stand_in = torch.empty(tuple(tensor.shape), device="meta")
    for step in steps:
        stand_in = step.apply(lambda function, *args: function(*args), stand_in)
    return stand_in.shape


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


def chosen_by(nodes: Sequence[fx.Node], experts: Sequence[Expert]) -> Chosen | None:
    """The stack of which `nodes[i]` is the entry of `experts[i]`; None where the last step to them takes none."""
    paths = [_path(node) for node in nodes]
    source, steps = paths[0].source, paths[0].steps
    if not steps or any(path.source is not source or path.steps[:-1] != steps[:-1] for path in paths):
        return None
    indices = [path.steps[-1].items for path in paths if isinstance(path.steps[-1], Index)]
    if len({*map(len, indices)}) != 1 or len(indices) != len(nodes):
        return None
    shape = shape_after(known_tensor(source), steps[:-1])
    for place in range(len(indices[0])):
        found = _entry(indices, experts, place, shape)
        if found is not None:
            passed = frozenset(node for path in paths for node in path.nodes)
            return Chosen(source, (*steps[:-1], *found[0]), found[1], passed)
    return None


def takes_all(items: Sequence[Item], sizes: Sequence[int]) -> bool:
    """Whether an index with these items takes all of a tensor of these sizes."""
    return list(items) == [Cut(0, size) for size in sizes]


class _Path(NamedTuple):
    source: fx.Node
    steps: tuple[Step, ...]
    nodes: tuple[fx.Node, ...]


def _path(node: fx.Node) -> _Path:
    """The steps to `node` from what is no view. An expert without a number may be met in the last one alone."""
    steps: list[Step] = []
    nodes: list[fx.Node] = []
    found = viewed(node)
    while found is not None and not (steps and has_expert(found.step)):
        steps.insert(0, found.step)
        nodes.append(node)
        node = found.operand
        found = viewed(node)
    return _Path(node, tuple(steps), tuple(nodes))


def has_expert(step: Step) -> bool:
    """Whether `step` takes the entry of an expert without a number."""
    return isinstance(step, Index) and any(isinstance(item, fx.Node) for item in step.items)


def _entry(
    indices: list[tuple[Item, ...]], experts: Sequence[Expert], place: int, shape: Sequence[int]
) -> tuple[tuple[Step, ...], int] | None:
    """(steps that bring experts to dim 0, added dims) where item `place` of each index takes its expert's entry."""
    before, own, after = indices[0][:place], [items[place] for items in indices], indices[0][place + 1 :]
    if any((items[:place], items[place + 1 :]) != (before, after) for items in indices):
        return None
    steps: list[Step] = []
    dim = sum(item is not None for item in before)
    sizes = list(shape)
    if own[0] is None or any(item != expert for item, expert in zip(own, experts, strict=True)):
        width = _width(own, experts)
        if not width or sizes[dim] % width:
            return None
        sizes[dim : dim + 1] = [sizes[dim] // width, width]
        steps.append(Reshape(tuple(sizes)))
        after = (Cut(0, width), *after)
    leading, before, after = _without_new(before, after)
    items = (*before, Cut(0, sizes[dim]), *after)
    if not takes_all(items, sizes):
        steps.append(Index(items))
    front = sum(not isinstance(item, int) for item in before)
    rank = sum(not isinstance(item, int) for item in items)
    if front:
        steps.append(Permute((front, *range(front), *range(front + 1, rank))))
    return tuple(steps), leading


def _width(own: Sequence[Item], experts: Sequence[Expert]) -> int:
    """w where each of `own` is the cut from e * w to (e + 1) * w of its expert e; else 0."""
    width = own[0].stop - own[0].start if isinstance(own[0], Cut) else 0
    cuts = [Cut(expert * width, (expert + 1) * width) for expert in experts if isinstance(expert, int)]
    return width if list(own) == cuts else 0


def _without_new(before: tuple[Item, ...], after: tuple[Item, ...]) -> tuple[int, tuple[Item, ...], tuple[Item, ...]]:
    """How many new dims stand first, and the items without these."""
    new = len(list(takewhile(lambda item: item is None, before)))
    before = before[new:]
    more = len(list(takewhile(lambda item: item is None, after))) if not before else 0
    return new + more, before, after[more:]


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
    if rank < 2 or (name == "getattr" and (node.args[1] not in ("T", "mT") or (node.args[1] == "T" and rank != 2))):
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
