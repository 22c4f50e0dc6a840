"""The steps that views of a parameter are made of, each of which can be taken for all experts at once.

On the stack of what the experts have, a step is the same with one dim more. It shares the memory of what it is taken
of, so that it may as well be taken later.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx


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


def shape_after(tensor: torch.Tensor, steps: Sequence[Step]) -> torch.Size:
    """The shape of `tensor` after `steps`."""
    if not steps:
        return tensor.shape
    stand_in = torch.empty(tuple(tensor.shape), device="meta")
    for step in steps:
        stand_in = step.apply(lambda function, *args: function(*args), stand_in)
    return stand_in.shape


def has_expert(step: Step) -> bool:
    """Whether `step` takes the entry of an expert without a number."""
    return isinstance(step, Index) and any(isinstance(item, fx.Node) for item in step.items)


def takes_all(items: Sequence[Item], sizes: Sequence[int]) -> bool:
    """Whether an index with these items takes all of a tensor of these sizes."""
    return list(items) == [Cut(0, size) for size in sizes]
