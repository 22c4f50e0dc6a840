"""Which tokens of which rank go to which experts: the table of layouts, and the batches made of them.

T tokens of a rank, K experts per token, E experts, D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.distributed.pool import WORLD_SIZE

D = 6
MOST_TOKENS = 9


@dataclass(frozen=True)
class Layout:
    """ids: of each rank, one row a token."""

    num_experts: int
    top_k: int
    ids: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Batch:
    """What one rank calls the experts with, and the gradient that comes back from above."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    upstream: Tensor


def batch(layout: Layout, rank: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(WORLD_SIZE * seed + rank)
    ids = torch.tensor(layout.ids[rank], dtype=torch.int64).reshape(-1, layout.top_k)
    x, upstream = torch.randn(2, len(ids), D, dtype=torch.float64, generator=generator)
    weights = torch.rand(ids.shape, dtype=torch.float64, generator=generator)
    return Batch(x.requires_grad_(), ids, weights.requires_grad_(), upstream)


def spread(num_experts: int, top_k: int, tokens: tuple[int, ...]) -> Layout:
    """Distinct experts for each token, evenly drawn."""
    generator = torch.Generator().manual_seed(7)
    ids = [torch.rand(count, num_experts, generator=generator).argsort(1)[:, :top_k] for count in tokens]
    return Layout(num_experts, top_k, tuple(tuple(map(tuple, rows.tolist())) for rows in ids))


LAYOUTS = {
    "even": spread(8, 2, (5, 5, 5, 5)),
    "uneven experts": spread(7, 3, (4, 4, 4, 4)),
    "a rank without experts": spread(5, 2, (4, 3, 4, 4)),
    "fewer experts than ranks": spread(3, 2, (4, 3, 4, 4)),
    "tokens differ by rank": spread(8, 2, (1, 9, 0, 4)),
    "K = 1": spread(8, 1, (3, 4, 5, 2)),
    "K = 8": spread(16, 8, (3, 4, 0, 6)),
    "K = E": spread(8, 8, (3, 4, 5, 2)),
    "all tokens to one rank": Layout(8, 2, (((2, 3), (3, 2)),) * WORLD_SIZE),
    "no tokens": Layout(8, 2, ((),) * WORLD_SIZE),
    "sentinels": Layout(8, 2, (((-1, 3), (8, 9), (7, 100)), ((0, -5),), ((8, 8),), ())),
    "one expert twice": Layout(8, 3, (((1, 1, 0), (5, 1, 5)),) * WORLD_SIZE),
}
