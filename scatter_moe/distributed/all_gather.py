"""The exchange without a host synchronisation: every rank gets all tokens and runs its own experts on them.

All shapes are static: it compiles to one graph and can be recorded in a CUDA graph. It moves every token to every rank
and needs memory for all ranks' tokens.

T tokens of this rank, P tokens a rank after padding, K experts per token, D model width, R ranks.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from scatter_moe.distributed import collectives
from scatter_moe.distributed.all_to_all import Experts
from scatter_moe.distributed.partition import Partition


def exchange_all_gather(
    experts: Experts,
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    partition: Partition,
    group: ProcessGroup,
    max_tokens: int | None = None,
) -> Tensor:
    """Runs all ranks' experts on this rank's tokens.

    Args:
        experts, x_TD, topk_ids_TK, topk_weights_TK, partition, group: as for `exchange_all_to_all`.
        max_tokens: P, the same on every rank: tokens are padded to it with sentinels. None where T itself is the same
            on every rank.

    Returns:
        `[T, D]` in x's dtype: the ranks' partial sums are added in it.

    Raises:
        ValueError: T above max_tokens.
    """
    num_tokens = x_TD.shape[0]
    if max_tokens is not None:
        missing = max_tokens - num_tokens
        if missing < 0:
            raise ValueError(f"x: got {num_tokens} tokens, accepted are at most max_tokens = {max_tokens}")
        x_TD, topk_weights_TK = (F.pad(rows, (0, 0, 0, missing)) for rows in (x_TD, topk_weights_TK))
        topk_ids_TK = F.pad(topk_ids_TK, (0, 0, 0, missing), value=-1)
    # The ids first: they are routed while x is on its way.
    ids_RPK, weights_RPK, x_RPD = collectives.all_gather((topk_ids_TK, topk_weights_TK, x_TD), group)
    y_RPD = experts(x_RPD, partition.local(ids_RPK), weights_RPK)
    y_PD = collectives.reduce_scatter(y_RPD, group)
    return y_PD if max_tokens is None else y_PD[:num_tokens]  # the gradient of a slice is a copy
