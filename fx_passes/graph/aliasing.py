"""Which nodes may share storage, and who writes to it.

Whatever isn't known to allocate its result may return a view of its first input; what returns several tensors, or may
do anything, of any input.
"""

import math
from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.node import map_arg

from fx_passes.graph.ops import POINTWISE, arg, example, fake_tensor, is_inplace, op_name, written

_MAY_CAST = frozenset("contiguous to float half bfloat16 double type_as".split())
"""Their input itself where it is already as asked for, and else a copy."""

_ALLOCATES = (POINTWISE - _MAY_CAST) | frozenset(
    """
    zeros zeros_like new_zeros ones ones_like empty empty_like new_empty full full_like new_full rand randn arange
    linear matmul mm bmm grouped_mm layer_norm rms_norm softmax log_softmax sum mean amax amin norm cumsum one_hot topk
    sort argsort nonzero index_add index_select gather scatter cat stack embedding repeat_interleave clone eq ne gt ge
    lt le greater greater_equal argmax max min any all where histc bincount logical_and logical_or logical_not
    """.split()
)
_RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten"))
_SAME_MEMORY = "scatter_moe_same_memory"


def note_inputs_in_one_memory(graph: fx.Graph) -> None:
    """Notes with each input of `graph` which others may lie where it lies: a view that is passed beside its base."""
    by_storage: dict[int, list[tuple[float, float, fx.Node]]] = {}
    for node in (*graph.find_nodes(op="placeholder"), *graph.find_nodes(op="get_attr")):
        tensor = fake_tensor(node)
        if tensor is not None and torch._C._has_storage(tensor):
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append((*_extent(tensor), node))
    for found in by_storage.values():
        for node, other in _overlapping(sorted(found)):
            node.meta.setdefault(_SAME_MEMORY, []).append(other)
            other.meta.setdefault(_SAME_MEMORY, []).append(node)


def _overlapping(extents: list[tuple[float, float, fx.Node]]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of which one begins before the other ends. extents: (start, stop, node), by start."""
    for at, (_, stop, node) in enumerate(extents):
        for start, _, other in extents[at + 1 :]:
            if start >= stop:
                break
            yield node, other


def _extent(tensor: torch.Tensor) -> tuple[float, float]:
    """From where to where `tensor` may lie in its storage, in bytes."""
    first = tensor.storage_offset()
    if not all(type(number) is int for number in (first, *tensor.shape, *tensor.stride())):
        return 0, math.inf
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first * tensor.itemsize), int((last + 1) * tensor.itemsize)


def allocates(node: fx.Node) -> bool:
    """Whether `node` is a tensor with memory of its own."""
    return op_name(node) in _ALLOCATES and not written(node)


def has_own_memory(node: fx.Node) -> bool:
    """Whether `node` allocates, or copies what an index tensor picks."""
    if op_name(node) != "getitem":
        return allocates(node)
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    picks = (fake_tensor(item) for item in index)
    return fake_tensor(node) is not None and any(pick is not None and pick.dim() > 0 for pick in picks)


def writes_before_reads(node: fx.Node) -> list[fx.Node]:
    """What writes to `node` by its name or that of another of them, in graph order; none if anyone reads in between."""
    names, writes = [node], []
    for name in names:
        writes += inplace_users(name)
        names += inplace_users(name)
    readers = {user for name in names for user in name.users}.difference(writes)
    early = any(reader < write for reader in readers for write in writes)
    return [] if early or any(_reads_beside(write, names) for write in writes) else sorted(writes)


def _reads_beside(write: fx.Node, names: list[fx.Node]) -> bool:
    """Whether `write` reads one of `names` in another place than that of what it writes to."""
    operands: list[fx.Node] = []
    map_arg((write.args[1:], write.kwargs), operands.append)
    return not set(names).isdisjoint(operands)


def made_by(node: fx.Node) -> fx.Node:
    """What made the entries of which `node` is the only name in use: the zeros of `torch.zeros(...).view(...)`."""
    while op_name(node) in _RESHAPES | _MAY_CAST and isinstance(node.args[0], fx.Node) and len(node.args[0].users) == 1:
        node = node.args[0]
    return node


def storage_of(node: fx.Node) -> fx.Node:
    """The node whose storage `node` may alias; the first of them where there may be several."""
    while sources := _aliased(node):
        node = sources[0]
    return node


def writers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that may write to what `node`, or a tensor with which it may share memory, holds."""
    names, stack = {node}, [node]
    while stack:
        name = stack.pop()
        yield from (user for user in name.users if name in written(user))
        others = {*_aliased(name), *(user for user in name.users if name in _aliased(user))}
        others = others.union(name.meta.get(_SAME_MEMORY, ())) - names
        names |= others
        stack.extend(others)


def inplace_users(node: fx.Node) -> list[fx.Node]:
    """What writes to `node` by its own name, in graph order."""
    return sorted(user for user in node.users if is_inplace(user) and arg(user, 0, "input") is node)


def is_read_before(node: fx.Node, writes: list[fx.Node]) -> bool:
    """Whether anyone reads `node`, which `writes` write to, before the last of them has."""
    early = any(reader not in writes and reader < writes[-1] for reader in node.users)
    return early or any(write.users for write in writes[:-1])


def _aliased(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs whose storage `node` may share; none where its storage is its own."""
    inputs = node.all_input_nodes
    if allocates(node) or _is_part_of_result(node):
        return ()
    may_be_any = isinstance(example(node), (tuple, list)) or len(written(node)) > 1 or op_name(node) == "set_"
    return tuple(inputs if may_be_any else inputs[:1])


def _is_part_of_result(node: fx.Node) -> bool:
    """`topk(...)[1]`: a tensor of its own among the results of an operation that allocates them."""
    source = arg(node, 0, "input")
    return op_name(node) == "getitem" and isinstance(example(source), (tuple, list)) and op_name(source) in _ALLOCATES
