"""How grouped rows and per-expert parameters are walked, shared by the implementations in plain PyTorch."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def segments(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first grouped row, end row) of each expert that has tokens. Copies offsets to the host."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def experts(parameters: Sequence[Tensor], expert_dim: int) -> Sequence[Tensor] | Tensor:
    """What indexed by e gives the parameter of expert e: the one stacked tensor, or the list of one tensor per expert.

    expert_dim: dimensions of one expert's parameter, 2 for a weight and 1 for a bias.
    """
    if len(parameters) == 1 and parameters[0].dim() == expert_dim + 1:
        return parameters[0]
    return parameters


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
