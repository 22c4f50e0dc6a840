"""How grouped rows and per-expert parameters are walked, shared by the implementations in plain PyTorch."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def segments(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first grouped row, end row) of each expert that has tokens. Copies offsets to the host."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


class Groups(NamedTuple):
    """The experts that have tokens, ascending, and the number of rows of each; the sentinels' is one more, the last.

    Splitting rows at once by `sizes` takes a fraction of the time of slicing them for each expert.
    """

    experts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, offsets_E: Tensor, num_rows: int) -> "Groups":
        """Copies offsets to the host."""
        ends = offsets_E.tolist()
        found = [(e, end - start) for e, (start, end) in enumerate(pairwise([0, *ends])) if end > start]
        return cls([e for e, _ in found], [*(size for _, size in found), num_rows - ends[-1]])


def experts(parameters: Sequence[Tensor], expert_dim: int) -> Sequence[Tensor] | Tensor:
    """What indexed by e gives the parameter of expert e: the one stacked tensor, or the list of one tensor per expert.

    expert_dim: dimensions of one expert's parameter, 2 for a weight and 1 for a bias.
    """
    if len(parameters) == 1 and parameters[0].dim() == expert_dim + 1:
        return parameters[0]
    return parameters


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
