"""The sum of tensors of one shape, each of which is added once.

    y0 + y1 + rest    rest += y0    torch.stack([y0, y1], d).sum(d)    sum([y0, y1])    buffer.sum(d)

A `buffer` holds several such tensors along one dim.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fx_passes.dense.sums import may_start, stacked
from fx_passes.graph.ops import ZEROS, arg, fake_tensor, is_inplace, normalized_dim, op_name, same_sizes, sizes_of

_SUMS = frozenset(("add", "iadd", "add_"))


@dataclass(frozen=True)
class PartSum:
    """`parts` and perhaps `rest`, summed; `nodes` are all nodes that do so, from the first to the result.

    Zeros that the parts are added to are among the nodes.
    """

    parts: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...] = ()
    rest: fx.Node | None = None

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]


def part_sums(graph: fx.Graph, parts: frozenset[fx.Node], buffers: Mapping[fx.Node, int]) -> Iterator[PartSum]:
    """Every sum that has parts, or the buffers that hold them along the dim that is said, and is as long as it gets."""
    found: dict[fx.Node, PartSum] = {}
    for node in graph.nodes:
        known = _over_dim(node, parts, buffers) or _added(node, parts, found)
        if known is not None:
            found[node] = known
    yield from found.values()


def _over_dim(node: fx.Node, parts: frozenset[fx.Node], buffers: Mapping[fx.Node, int]) -> PartSum | None:
    """`torch.stack(parts, d).sum(d)`, `buffer.sum(d)`."""
    whole, dim = arg(node, 0, "input"), arg(node, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    plain = op_name(node) == "sum" and not set(node.kwargs) - {"input", "dim"} and len(node.args) <= 2
    if not plain or type(dim) is not int or fake_tensor(whole) is None:
        return None
    dim = normalized_dim(dim, len(sizes_of(whole)))
    if whole in buffers:
        return PartSum((whole,), (node,)) if buffers[whole] == dim else None
    own, along = stacked(whole) or ((), None)
    return PartSum(own, (*_made_for(whole), whole, node)) if along == dim and parts.issuperset(own) else None


def _made_for(stack: fx.Node) -> tuple[fx.Node, ...]:
    """What adds the dim along which a `cat` stacks."""
    return () if op_name(stack) == "stack" else tuple(stack.all_input_nodes)


def _added(node: fx.Node, parts: frozenset[fx.Node], found: dict[fx.Node, PartSum]) -> PartSum | None:
    """The sum of two operands, of which one at least is a part or a sum of parts."""
    if op_name(node) not in _SUMS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = (_as_sum(operand, parts, found) for operand in node.args)
    if first is not None and second is not None:
        total = _both(first, second)
    elif first is not None:
        total = _with_rest(first, node.args[1], may_start=True)
    elif second is not None:
        total = _with_rest(second, node.args[0], may_start=may_start(node.args[0], node))
    else:
        return None
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    if total is None or not all(same_sizes(sizes_of(node), sizes_of(operand)) for operand in operands):
        return None
    for operand in operands:
        found.pop(operand, None)
    return replace(total, nodes=(*total.nodes, node))


def _as_sum(operand: Any, parts: frozenset[fx.Node], found: dict[fx.Node, PartSum]) -> PartSum | None:
    return PartSum((operand,)) if operand in parts else found.get(operand)


def _both(first: PartSum, second: PartSum) -> PartSum | None:
    """The sum of two that have no part in common, and one rest at most."""
    if (first.rest is not None and second.rest is not None) or not set(first.parts).isdisjoint(second.parts):
        return None
    return PartSum((*first.parts, *second.parts), (*first.nodes, *second.nodes), first.rest or second.rest)


def _with_rest(total: PartSum, rest: Any, *, may_start: bool) -> PartSum | None:
    """`total` and what is no part: 0, fresh zeros, or anything that may be added to here."""
    if not isinstance(rest, fx.Node):
        return total if rest == 0 else None
    if op_name(rest) in ZEROS and not is_inplace(rest) and len(rest.users) == 1:
        return replace(total, nodes=(rest, *total.nodes))
    return replace(total, rest=rest) if total.rest is None and may_start else None
