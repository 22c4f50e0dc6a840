"""The exchange with the least bytes: each token goes once to each rank that has one of its experts.

    count    how many tokens go to each rank: one all-to-all of R numbers, one host synchronisation
    send     x, ids and router weights of those tokens
    experts  on what came; ids of other ranks' experts are sentinels, which cost nothing
    return   one row a token and rank: the sum over that rank's experts
    combine  the sum over ranks, accumulated in fp32

T tokens of this rank, M tokens that it receives, K experts per token, D model width, R ranks, S = min(K, R).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from scatter_moe.distributed.partition import Partition
from scatter_moe.distributed.trip import Trip

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.compiler.disable(reason="all-to-all reads the number of tokens for each rank on the host")
def exchange_all_to_all(
    experts: Experts,
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    partition: Partition,
    group: ProcessGroup,
) -> Tensor:
    """Runs all ranks' experts on this rank's tokens. T may differ by rank and be zero.

    Args:
        experts: `experts(x_MD, ids_MK, weights_MK)` gives `[M, D]`, the weighted sum over this rank's experts. Ids
            count from this rank's first expert; those outside are to contribute nothing.
        x_TD: `[T, D]`.
        topk_ids_TK: int32 or int64 `[T, K]`, ids among all experts; outside 0..E-1 contributes nothing.
        topk_weights_TK: `[T, K]`, any floating-point dtype.
        partition: who has which expert.
        group: the ranks among which the experts are divided; all must call.

    Returns:
        `[T, D]` in x's dtype.
    """
    trip = Trip(destinations(topk_ids_TK, partition), group)
    x_MD, weights_MK, ids_MK = trip.out(x_TD, topk_weights_TK, topk_ids_TK)
    return trip.back(experts(x_MD, partition.local(ids_MK), weights_MK))


def destinations(topk_ids_TK: Tensor, partition: Partition) -> Tensor:
    """`[T, S]`: the ranks that each token goes to, each once; R in the places that are left."""
    owner_TK, num_ranks = partition.owner(topk_ids_TK), partition.num_ranks
    if topk_ids_TK.shape[1] < num_ranks:
        ranks_TK = owner_TK.sort(dim=-1).values
        again = F.pad(ranks_TK[:, 1:] == ranks_TK[:, :-1], (1, 0))
        return ranks_TK.masked_fill(again, num_ranks)
    goes_TR = torch.zeros(len(owner_TK), num_ranks + 1, dtype=torch.bool, device=owner_TK.device)
    goes_TR = goes_TR.scatter_(1, owner_TK, True)[:, :num_ranks]
    return torch.where(goes_TR, torch.arange(num_ranks, device=owner_TK.device), num_ranks)
