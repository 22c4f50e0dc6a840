"""How grouped rows and per-expert parameters are walked, shared by the implementations in plain PyTorch."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def segments(offsets_E: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, first grouped row, end row) of each expert that has tokens. Copies offsets to the host."""
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


@dataclass
class Groups:
    """The rows of each expert, read from offsets on the host.

    experts: those that have tokens, ascending; sizes: the number of rows of each, and last the sentinels'. Splitting
    rows at once by `sizes` takes a fraction of the time of slicing them for each expert.
    """

    experts: list[int]
    sizes: list[int]
    num_valid: int
    offsets_E: Tensor
    _row_experts: Tensor | None = None

    @classmethod
    def read(cls, offsets_E: Tensor, num_rows: int) -> "Groups":
        """Raises ValueError where experts have more rows than there are, which only the host can see."""
        hit, sizes, start = [], [], 0
        for expert, end in enumerate(offsets_E.tolist()):
            if end > start:
                hit.append(expert)
                sizes.append(end - start)
                start = end
        if start > num_rows:
            raise ValueError(
                f"offsets: got rows up to {start} for the experts, accepted are up to {num_rows}, all slots"
            )
        return cls(hit, [*sizes, num_rows - start], start, offsets_E)

    def each(self) -> Iterator["Groups"]:
        """Each expert's rows alone."""
        for expert, size in zip(self.experts, self.sizes, strict=False):
            yield Groups([expert], [size, 0], size, self.offsets_E)

    @property
    def num_experts(self) -> int:
        return self.offsets_E.shape[0]

    @property
    def num_rows(self) -> int:
        return self.num_valid + self.sizes[-1]

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Each expert's rows (the sentinels' may follow). One row stands for as many as there are."""
        if rows.shape[0] == 1:
            return [rows if size == 1 else rows.expand(size, *rows.shape[1:]) for size in self.sizes[:-1]]
        return (rows,) if self.sizes[0] == rows.shape[0] else rows.split_with_sizes(self.sizes)

    def row_experts(self) -> Tensor:
        """The expert of each row that has one, int32."""
        if self._row_experts is None:
            numbers = [e for e, size in zip(self.experts, self.sizes, strict=False) for _ in range(size)]
            self._row_experts = int32_tensor(numbers)
        return self._row_experts


def int32_tensor(values: list[int]) -> Tensor:
    """Half the time of torch.tensor."""
    buffer = array("i", values)
    return torch.frombuffer(buffer, dtype=torch.int32) if buffer else torch.empty(0, dtype=torch.int32)


def experts(parameters: Sequence[Tensor], expert_dim: int) -> Sequence[Tensor] | Tensor:
    """What indexed by e gives the parameter of expert e: the one stacked tensor, or the list of one tensor per expert.

    expert_dim: dimensions of one expert's parameter, 2 for a weight and 1 for a bias.
    """
    if len(parameters) == 1 and parameters[0].dim() == expert_dim + 1:
        return parameters[0]
    return parameters


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
