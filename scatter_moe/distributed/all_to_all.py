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

from scatter_moe.distributed import collectives
from scatter_moe.distributed.partition import Partition

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
_OPS = torch.ops.scatter_moe


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
    ranks_TS = destinations(topk_ids_TK, partition)
    width = ranks_TS.shape[1]
    order, offsets = _OPS.route(ranks_TS, partition.num_ranks)
    sent, received = _sizes(offsets, group)
    tokens = order[: sum(sent)] // width

    def rows(tensor: Tensor) -> Tensor:
        """The tokens' rows in the order in which they are sent."""
        return _OPS.dispatch(tensor, order, offsets, width)[: len(tokens)]

    x_MD, weights_MK, ids_MK = collectives.all_to_all(
        (rows(x_TD), rows(topk_weights_TK), topk_ids_TK[tokens]), sent, received, group
    )
    y_MD = experts(x_MD, partition.local(ids_MK), weights_MK)
    (y,) = collectives.all_to_all((y_MD,), received, sent, group)
    return _OPS.combine(F.pad(y, (0, 0, 0, order.numel() - len(tokens))), None, order, offsets, width, True)


def destinations(topk_ids_TK: Tensor, partition: Partition) -> Tensor:
    """`[T, S]`: the ranks that each token goes to, each once; R where there are fewer than S."""
    ranks_TK = partition.owner(topk_ids_TK).sort(dim=-1).values
    again = F.pad(ranks_TK[:, 1:] == ranks_TK[:, :-1], (1, 0))
    ranks_TK = ranks_TK.masked_fill(again, partition.num_ranks).sort(dim=-1).values
    return ranks_TK[:, : partition.num_ranks]


def _sizes(offsets_R: Tensor, group: ProcessGroup) -> tuple[list[int], list[int]]:
    """How many tokens go to each rank, and how many come from each."""
    sent_R = offsets_R.diff(prepend=offsets_R.new_zeros(1))
    ones = [1] * len(sent_R)
    (received_R,) = collectives.all_to_all((sent_R,), ones, ones, group)
    sent, received = torch.stack((sent_R, received_R)).tolist()
    return sent, received
