"""Tensors that say how many slots consecutive experts have; rows that lie expert by expert are cut between two such.

counts[e]    counts.cumsum(0)[e]    counts[:e].sum()    start + counts[e]    end - counts[e]
bounds[e], where bounds = cat((zeros(1), counts.cumsum(0))), pad(counts.cumsum(0), (1, 0)) or counts.cumsum(0) - counts
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fx_passes.facts import fact
from fx_passes.facts.statements import Counts
from fx_passes.facts.tallies import fills_of
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import ZEROS, arg, fake_tensor, op_name, same_sizes, sizes_of


@dataclass(frozen=True)
class Total:
    """A number: how many slots the experts from `first` to before `stop` have. `node` counts those of each expert."""

    ids: fx.Node
    num_experts: int
    first: int
    stop: int
    node: fx.Node = field(compare=False, repr=False)

    def plus(self, other: "Total") -> "Total | None":
        """The sum, where the experts of one follow those of the other."""
        for left, right in ((self, other), (other, self)):
            if left.stop == right.first:
                return replace(left, stop=right.stop) if _are_alike(left, right) else None
        return None

    def minus(self, other: "Total") -> "Total | None":
        """The difference, where the experts of `other` are the first or the last of these."""
        if not _are_alike(self, other) or not self.first <= other.first <= other.stop <= self.stop:
            return None
        if self.first == other.first:
            return replace(self, first=other.stop)
        return replace(self, stop=other.first) if self.stop == other.stop else None


@dataclass(frozen=True)
class Totals:
    """value[i] is of the experts from i, or from 0 where they `accumulate`, to before i + `after`."""

    ids: fx.Node
    num_experts: int
    accumulate: bool
    after: int
    node: fx.Node = field(compare=False, repr=False)

    def at(self, place: int) -> Total | None:
        stop = place + self.after
        if not 0 <= place <= stop <= self.num_experts:
            return None
        return Total(self.ids, self.num_experts, 0 if self.accumulate else place, stop, self.node)


def _are_alike(left: Total | Totals, right: Total | Totals) -> bool:
    return (left.ids, left.num_experts) == (right.ids, right.num_experts)


def total_of(node: Any) -> Total | None:
    """The number that `node`, a tensor without dims, is; None where it says anything else, or was written to."""
    known = _known(node)
    return known if isinstance(known, Total) else None


def _known(node: Any, addition: fx.Node | None = None) -> Total | Totals | None:
    """What `node` is, or was before `addition` was made to it."""
    if not isinstance(node, fx.Node):
        return None
    if "scatter_moe_total" not in node.meta:
        node.meta["scatter_moe_total"] = _derive(node)
    known = node.meta["scatter_moe_total"]
    if known is None or set(writers_of(node)) - {addition} - _own_additions(node) - fills_of(node):
        return None
    return known


def _own_additions(node: Any) -> set[fx.Node]:
    """The additions in place that lead to `node`: what they write is what it is known to be."""
    additions: set[fx.Node] = set()
    while isinstance(node, fx.Node) and op_name(node) == "iadd":
        additions.add(node)
        node = node.args[0]
    return additions


def _derive(node: fx.Node) -> Total | Totals | None:
    tensor, counts = fake_tensor(node), fact(node)
    if tensor is None or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    if isinstance(counts, Counts):
        return _all(node, counts)
    rule = _RULES.get(op_name(node) or "")
    return rule(node) if rule is not None else None


def _all(node: fx.Node, counts: Counts) -> Totals | None:
    source: Any = node
    while isinstance(fact(source), Counts):
        if set(writers_of(source)) - fills_of(source):
            return None
        source = arg(source, 0, "input")
    if counts.positive or counts.open_ended:
        return None
    return Totals(counts.ids, counts.num_classes, counts.cumulative, 1, node)


def _entry(node: fx.Node) -> Total | Totals | None:
    """`totals[e]`, `totals[a:]`, `totals[:a]`."""
    index = arg(node, 1, "index") if op_name(node) == "getitem" else arg(node, 2, "index")
    known, source = _known(node.args[0]), fake_tensor(node.args[0])
    if not isinstance(known, Totals) or source is None or (op_name(node) == "select" and arg(node, 1, "dim") != 0):
        return None
    length = source.shape[0] if type(source.shape[0]) is int else None
    if isinstance(index, slice):
        return _part(known, index, length) if length is not None else None
    if type(index) is not int:
        return None
    return known.at(index + length if index < 0 and length is not None else index)


def _part(known: Totals, index: slice, length: int) -> Totals | None:
    if index.step not in (None, 1) or any(
        type(item) is not int and item is not None for item in (index.start, index.stop)
    ):
        return None
    start, _, _ = index.indices(length)
    return replace(known, after=known.after + start) if start == 0 or known.accumulate else None


def _sum(node: fx.Node) -> Total | None:
    """`counts[:e].sum()`."""
    known, source = _known(arg(node, 0, "input")), fake_tensor(arg(node, 0, "input"))
    is_plain = len(node.args) + len(node.kwargs) == 1
    if not isinstance(known, Totals) or known.accumulate or source is None or not is_plain:
        return None
    first, length = known.at(0), source.shape[0]
    return replace(first, stop=length) if first is not None and type(length) is int else None


def _add(node: fx.Node) -> Total | Totals | None:
    left, right = node.args if len(node.args) == 2 and not node.kwargs else (None, None)
    first, second = _known(left, node if op_name(node) == "iadd" else None), _known(right)
    if 0 in (left, right):
        return first or second
    return first.plus(second) if isinstance(first, Total) and isinstance(second, Total) else None


def _sub(node: fx.Node) -> Total | Totals | None:
    """`end - counts[e]`; `ends - counts`, where each expert's rows begin."""
    left, right = map(_known, node.args) if len(node.args) == 2 and not node.kwargs else (None, None)
    if isinstance(left, Total) and isinstance(right, Total):
        return left.minus(right)
    if not isinstance(left, Totals) or not isinstance(right, Totals) or not _are_alike(left, right):
        return None
    is_start = left.accumulate and not right.accumulate and left.after == right.after == 1
    same = same_sizes(*map(sizes_of, node.args))
    return replace(left, after=0) if is_start and same else None


def _cat(node: fx.Node) -> Totals | None:
    """`cat((zeros(1), ends))`."""
    parts = arg(node, 0, "tensors")
    if (
        len(node.args) > 1
        or node.kwargs.keys() - {"tensors"}
        or not isinstance(parts, (tuple, list))
        or len(parts) != 2
    ):
        return None
    zero = fake_tensor(parts[0])
    is_zero = op_name(parts[0]) in ZEROS and zero is not None and tuple(zero.shape) == (1,)
    return _after_zero(parts[1]) if is_zero and not any(writers_of(parts[0])) else None


def _pad(node: fx.Node) -> Totals | None:
    """`pad(ends, (1, 0))`."""
    rest = (arg(node, 2, "mode", "constant"), arg(node, 3, "value"))
    is_zero = rest in (("constant", None), ("constant", 0)) and tuple(arg(node, 1, "pad")) == (1, 0)
    return _after_zero(arg(node, 0, "input")) if is_zero else None


def _after_zero(ends: fx.Node) -> Totals | None:
    known = _known(ends)
    is_ends = isinstance(known, Totals) and known.accumulate and known.after == 1
    return replace(known, after=0) if is_ends else None


def _same(node: fx.Node) -> Total | Totals | None:
    return _known(arg(node, 0, "input"))


_RULES: dict[str, Callable[[fx.Node], Total | Totals | None]] = {
    "getitem": _entry,
    "select": _entry,
    "sum": _sum,
    "add": _add,
    "iadd": _add,
    "sub": _sub,
    "cat": _cat,
    "concat": _cat,
    "pad": _pad,
    **dict.fromkeys("to long int cpu clone contiguous detach".split(), _same),
}
