"""Experts' entries of one stacked parameter, whichever dim the experts lie along and however it is cut up among them.

W[e]    W[:, :F][e]    W.unbind(0)[e]    W[1, e]    W[e * F : (e + 1) * F]
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from torch import fx

from fx_passes.body.parameter_views import viewed
from fx_passes.body.view_steps import Cut, Index, Item, Permute, Reshape, Step, has_expert, shape_after, takes_all
from fx_passes.graph.markers import Expert
from fx_passes.graph.ops import known_tensor


class Chosen(NamedTuple):
    """An expert's entry of `source`: after `steps` the experts lie along dim 0.

    The entry has `leading` dims of size one before those that are left. `nodes` lead to the entries of all experts.
    """

    source: fx.Node
    steps: tuple[Step, ...]
    leading: int
    nodes: frozenset[fx.Node]


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
