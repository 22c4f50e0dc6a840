"""The expert body: what one expert does to its rows, free of the loop it was written in.

    Gathered        x[tokens]: rows of a [T, ...] tensor
    SlotGathered    weights[tokens, slots]: one value a row of a [T, K] tensor, or table[tokens, e] of a [T, E] tensor
    PerExpert       an expert's parameter: a view of its entry of one stacked tensor, or of its own of E tensors
    Shared          anything from outside the loop that is the same for all experts
    Op              an operation on these
    Scaled          rows times the weights of their slots

`fx_passes.body.unify` finds the one body that the experts of a loop share. T tokens, K experts per token, E experts.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fx_passes.body.view_steps import Cut, Index, Item, Permute, Step, shape_after, takes_all
from fx_passes.graph.ops import fake_tensor, known_tensor


@dataclass(frozen=True, eq=False)
class Gathered:
    """`leading` dims of size one stand before the row dim (`x[None, tokens]`)."""

    source: fx.Node
    node: fx.Node
    leading: int = 0


@dataclass(frozen=True, eq=False)
class SlotGathered:
    """`trailing` dims of size one follow the row dim (`weights[tokens, slots, None]`).

    A `table` is indexed by expert, not by slot; where its `experts_first`, it is [E, T].
    """

    source: fx.Node
    node: fx.Node
    trailing: int
    table: bool = False
    experts_first: bool = False


@dataclass(frozen=True, eq=False)
class PerExpert:
    """What an expert has of `stacked`, [E, ...] after `steps`, or of `tensors`, one an expert, after `steps`.

    `leading` dims of size one stand before its own. `transposed`: the body sees it with its two dims swapped.
    """

    node: fx.Node
    stacked: fx.Node | None = None
    tensors: tuple[fx.Node, ...] = ()
    transposed: bool = False
    leading: int = 0
    steps: tuple[Step, ...] = ()

    @property
    def parameters(self) -> tuple[fx.Node, ...]:
        return (self.stacked,) if self.stacked is not None else self.tensors

    @property
    def count(self) -> int | torch.SymInt:
        """Of how many experts it is."""
        return self.sizes[0] if self.stacked is not None else len(self.tensors)

    @property
    def shape(self) -> torch.Size:
        """The shape of one expert's, before it is transposed."""
        return self.sizes[1:] if self.stacked is not None else self.sizes

    @functools.cached_property
    def sizes(self) -> torch.Size:
        """Of the whole stack, or of one of the tensors, after `steps`."""
        return shape_after(known_tensor(self.parameters[0]), self.steps)

    def after(self, step: Step, node: fx.Node) -> "PerExpert | None":
        """What `step` takes of it, which is `node`; None where no rule says what that is."""
        if isinstance(step, Permute) and step.dims == (1, 0) and not self.leading:
            return replace(self, node=node, transposed=not self.transposed)
        if isinstance(step, Index):
            return self._indexed(step.items, node)
        return None if self.leading or self.transposed else self._with(step, node)

    def _indexed(self, items: tuple[Item, ...], node: fx.Node) -> "PerExpert | None":
        new = len(list(itertools.takewhile(lambda item: item is None, items)))
        ones, items = items[new : new + self.leading], items[new + self.leading :]
        if None in ones:
            return None
        value = replace(self, node=node, leading=new + sum(isinstance(item, Cut) for item in ones))
        if takes_all(items, self.shape if not self.transposed else self.shape[::-1]):
            return value
        if self.transposed:
            is_part = len(items) == 2 and all(isinstance(item, Cut) for item in items)
            return value._with(Index(items[::-1]), node) if is_part else None
        return value._with(Index(items), node)

    def _with(self, step: Step, node: fx.Node) -> "PerExpert":
        own = step.on_stack(int(self.count)) if self.stacked is not None else step
        return replace(self, node=node, steps=(*self.steps, own))


@dataclass(frozen=True, eq=False)
class Shared:
    node: fx.Node


@dataclass(frozen=True, eq=False)
class Op:
    """`name` applied to `args` and `kwargs` (nested tuples, lists and dicts of values and constants).

    `node` is the first expert's.
    """

    name: str
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    has_rows: bool

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Argument given by position `index` or by keyword `name`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)


@dataclass(frozen=True, eq=False)
class Scaled:
    """`rows`, each times the weight of its slot, where the slots of a token are summed after the experts ran."""

    rows: "Value"
    weights: SlotGathered

    @property
    def node(self) -> fx.Node:
        return self.rows.node


Value = Gathered | SlotGathered | PerExpert | Shared | Op | Scaled
_VALUES = (Gathered, SlotGathered, PerExpert, Shared, Op, Scaled)


@dataclass(frozen=True)
class Body:
    """`writes` are the writes in place that `values` follow."""

    root: Value
    values: tuple[Value, ...] = field(repr=False)
    nodes: frozenset[fx.Node] = field(repr=False)
    writes: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    def of(self, kind: type) -> Iterator[Any]:
        return (value for value in self.values if isinstance(value, kind))

    def scaled(self, source: fx.Node, *, table: bool = False) -> "Body":
        """This body, its rows times the weights [T, K] of their slots, or the entries of a table [T, E]."""
        weights = SlotGathered(source, source, trailing=1, table=table)
        root = Scaled(self.root, weights)
        return replace(self, root=root, values=(*self.values, weights, root))


def children(value: Value) -> Iterator[Value]:
    """The values that an operation reads."""
    if isinstance(value, Op):
        yield from nested_values((value.args, value.kwargs))


def nested_values(structure: Any) -> Iterator[Value]:
    if isinstance(structure, _VALUES):
        yield structure
    elif isinstance(structure, dict):
        yield from nested_values(tuple(structure.values()))
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from nested_values(item)
    elif isinstance(structure, slice):
        yield from nested_values((structure.start, structure.stop, structure.step))


def map_values(structure: Any, change: Callable[[Value], Any]) -> Any:
    """`structure` with each value in it replaced."""
    if isinstance(structure, _VALUES):
        return change(structure)
    if isinstance(structure, dict):
        return {key: map_values(item, change) for key, item in structure.items()}
    if isinstance(structure, (tuple, list)):
        return type(structure)(map_values(item, change) for item in structure)
    if isinstance(structure, slice):
        return slice(*(map_values(item, change) for item in (structure.start, structure.stop, structure.step)))
    return structure


def has_rows(value: Value) -> bool:
    return isinstance(value, (Gathered, SlotGathered, Scaled)) or (isinstance(value, Op) and value.has_rows)


def rank(value: Any) -> int | None:
    """How many dims `value` has; None where it is no value or no tensor."""
    if isinstance(value, PerExpert):
        return value.leading + len(value.shape)
    tensor = fake_tensor(getattr(value, "node", None))
    return tensor.dim() if tensor is not None else None
