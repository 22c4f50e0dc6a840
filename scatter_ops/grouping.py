"""How grouped rows and per-expert parameters are walked, shared by the implementations in plain PyTorch."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


def segments(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first grouped row, end row) of each expert that has tokens. Copies offsets to the host."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


class Groups:
    """The rows of each expert, read from offsets on the host.

    experts: those that have tokens, ascending; sizes: the number of rows of each, and last the sentinels'. Splitting
    rows at once by `sizes` takes a fraction of the time of slicing them for each expert.
    """

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        self.num_rows, self._ends = num_rows, offsets_E.tolist()
        self.num_experts, self.num_valid = len(self._ends), self._ends[-1]

    @cached_property
    def experts(self) -> list[int]:
        return [e for e, (start, end) in enumerate(pairwise([0, *self._ends])) if end > start]

    @cached_property
    def sizes(self) -> list[int]:
        sizes = [end - start for start, end in pairwise([0, *self._ends]) if end > start]
        return [*sizes, self.num_rows - self.num_valid]

    @cached_property
    def row_experts(self) -> list[int]:
        """The expert of each row that has one."""
        return [e for e, size in zip(self.experts, self.sizes, strict=False) for _ in range(size)]


def experts(parameters: Sequence[Tensor], expert_dim: int) -> Sequence[Tensor] | Tensor:
    """What indexed by e gives the parameter of expert e: the one stacked tensor, or the list of one tensor per expert.

    expert_dim: dimensions of one expert's parameter, 2 for a weight and 1 for a bias.
    """
    if len(parameters) == 1 and parameters[0].dim() == expert_dim + 1:
        return parameters[0]
    return parameters


def select_experts(parameters: Sequence[Tensor], expert_dim: int, groups: Groups) -> Tensor:
    """A copy of its expert's parameter for each row that has an expert."""
    per_expert = experts(parameters, expert_dim)
    if isinstance(per_expert, Tensor):
        return per_expert.index_select(0, torch.tensor(groups.row_experts))
    return torch.stack([per_expert[e] for e in groups.row_experts])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
