"""Stand-ins for "the expert of this iteration" in a captured graph.

A loop `for expert in hit` has a length that no graph can hold, so it is captured as one iteration over an expert that
has no value: a node whose target is `current_expert`. Indexing by it is a node whose target is `select_expert`. A loop
over all experts is captured in the same way: its expert is a number without a value, `each_expert`. Where the experts
are modules, a parameter of the one that is traced becomes `expert_parameter`. None of these is ever executed for a
result: a graph that still holds one after the rewrite is captured again without it.
"""

from typing import Any

import torch
from torch import fx

Expert = int | fx.Node
"""An expert of a loop: its number where the loop was unrolled, the `current_expert` node where it was not."""

_EXPERT = "scatter_moe_expert"
_ASKED = "scatter_moe_asked_for_number"


def current_expert(hit: torch.Tensor) -> torch.Tensor:
    """One element of `hit`, of unknown value: shape `hit.shape[1:]`."""
    return hit.new_zeros(hit.shape[1:])


def place_among_hits(_hit: torch.Tensor) -> int:
    """Where the expert of an iteration stands in the list of those with a token, as a number of unknown value."""
    return 0


def each_expert(num_experts: int) -> int:
    """A number of unknown value, from 0 to `num_experts` - 1."""
    return num_experts - 1


def experts_of_each(expert: Any) -> int | None:
    """How many experts an `each_expert` node stands for; None for anything else."""
    if not isinstance(expert, fx.Node) or expert.target is not each_expert:
        return None
    (number,) = expert.args
    assert isinstance(number, int)
    return number


def expert_parameter(parameters: list[torch.Tensor] | torch.Tensor, _expert: torch.Tensor | int) -> torch.Tensor:
    """The one of `parameters`, a tensor for each expert or all in one, that is the expert's."""
    return parameters[0]


def select_expert(tensor: torch.Tensor, _expert: torch.Tensor | int, dim: int, keepdim: bool) -> torch.Tensor:
    """`tensor` at the expert's place along `dim`.

    `keepdim` where the index has shape [1]: advanced indexing keeps the dim.
    """
    return tensor.narrow(dim, 0, 1).clone() if keepdim else tensor.select(dim, 0)


def mark_expert(node: fx.Node, expert: Expert) -> None:
    node.meta[_EXPERT] = expert


def ask_for_number(expert: Expert) -> None:
    """An expert that stands for all has to have a number, so that what is computed of its weights can be kept."""
    if isinstance(expert, fx.Node):
        expert.meta[_ASKED] = True


def is_asked_for_number(expert: fx.Node | None) -> bool:
    return expert is not None and expert.meta.get(_ASKED, False)


def expert_of(value: Any) -> Expert | None:
    """The expert that `value` (a node) stands for, or None."""
    return value.meta.get(_EXPERT) if isinstance(value, fx.Node) else None


def index_with_expert(tensor: torch.Tensor, index: tuple[Any, ...], place: int) -> torch.Tensor:
    """`tensor[index]`, where `index[place]` is the expert and other items are tensors of row positions."""
    return tensor[(*index[:place], 0, *index[place + 1 :])]


def index_list(indices: torch.Tensor) -> torch.Tensor:
    """`indices.tolist()` where the list only serves as an index: the tensor does as well."""
    return indices.clone()


def expert_counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many slots each expert has."""
    return torch.bincount(ids.flatten(), minlength=num_experts)


def expert_count(counts: torch.Tensor, first: int, stop: int) -> int:
    """How many slots the experts from `first` to before `stop` have, as a number of unknown value."""
    return int(counts[first:stop].sum())


def expert_segment(rows: torch.Tensor, counts: torch.Tensor, expert: int) -> torch.Tensor:
    """The rows of one expert, where they lie expert by expert."""
    ends = counts.cumsum(0)
    return rows[ends[expert] - counts[expert] : ends[expert]]


def expert_places(counts: torch.Tensor, expert: int) -> torch.Tensor:
    """Where the rows of one expert are, among rows that lie expert by expert."""
    stop = int(counts[: expert + 1].sum())
    return torch.arange(stop - int(counts[expert]), stop)


def expert_cat(parts: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """`torch.cat(parts)` of what was computed from the segments of all experts in turn."""
    return torch.cat(parts)


def experts_hit(counts: torch.Tensor) -> int:
    """How many experts have a token, as a number of unknown value."""
    return int((counts > 0).sum())
