"""GShard's router: the best expert always, the second best at random.

T tokens, E experts, K = 2.
"""

from typing import Any

import torch
from torch import Tensor

from scatter_moe.routers.router import Router


class GShardRouter(Router):
    """The two most probable experts; in training the second is used with probability 2 g2.

    The top-2 gating of GShard (arXiv 2006.16668): weights g1, g2 are the two largest probabilities divided by
    their sum; where the second expert isn't used its slot is a sentinel and the first keeps the weight g1. In
    evaluation both are used. The paper's auxiliary loss counts first choices, `load_balancing_loss(logits,
    topk_ids[:, :1])`, and its capacity is `CapacityRouter(router, capacity_factor, priority="choice")`.

    Args:
        d_model, num_experts (two or more) and keyword arguments: see `Router`.
    """

    def __init__(self, d_model: int, num_experts: int, **settings: Any) -> None:
        super().__init__(d_model, num_experts, 2, **settings)

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(2)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if not self.training:
            return weights_TK, ids_TK
        first, second = weights_TK.detach().unbind(-1)
        used_TK = torch.stack([torch.ones_like(first, dtype=torch.bool), 2 * second > torch.rand_like(second)], -1)
        return torch.where(used_TK, weights_TK, 0.0), torch.where(used_TK, ids_TK, ids_TK + self.num_experts)
