"""Which experts live on which rank: contiguous ranges, cut as `DTensor`'s `Shard(0)` and `torch.chunk` cut them.

T tokens, K experts per token, E experts, R ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """E experts on R ranks, ceil(E / R) on each until none is left: the last ranks may have fewer, or none.

    Args:
        num_experts: E.
        num_ranks: R.
        rank: this rank, 0..R-1.
    """

    num_experts: int
    num_ranks: int
    rank: int

    @property
    def per_rank(self) -> int:
        return -(-self.num_experts // self.num_ranks)

    @property
    def first(self) -> int:
        """This rank's first expert."""
        return min(self.rank * self.per_rank, self.num_experts)

    @property
    def num_local(self) -> int:
        """How many experts this rank has."""
        return min(self.per_rank, self.num_experts - self.first)

    def owner(self, topk_ids_TK: Tensor) -> Tensor:
        """The rank that each slot goes to; R for a slot whose id is outside 0..E-1."""
        nobody = (topk_ids_TK < 0) | (topk_ids_TK >= self.num_experts)
        return torch.where(nobody, self.num_ranks, topk_ids_TK // self.per_rank)

    def local(self, topk_ids_TK: Tensor) -> Tensor:
        """Ids counted from this rank's first expert: those of other ranks fall outside 0..num_local-1."""
        return topk_ids_TK - self.first
