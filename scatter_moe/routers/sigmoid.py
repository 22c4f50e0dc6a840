"""DeepSeek-V3's router: sigmoid scores, choice within groups, balance kept by a bias instead of a loss.

T tokens, K experts per token, E experts, G groups of experts.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from scatter_moe.routers.router import Router


class SigmoidRouter(Router):
    """s = sigmoid(logits); the K experts of largest s + correction_bias among the best groups, weighted by s.

    DeepSeek-V3 (arXiv 2412.19437). The bias decides which experts are chosen and
    never enters a weight or a gradient. A group's score is the sum of its two largest s + correction_bias; experts
    outside the `topk_groups` best groups are not chosen (node-limited routing).

    Args:
        num_groups: G, equal groups of consecutive experts; 1 is no grouping.
        topk_groups: how many groups a token may use.
        renormalize: a token's weights are divided by their sum.
        scale: multiplies the weights (`routed_scaling_factor`).
        d_model, num_experts, top_k and keyword arguments: see `Router`.

    Buffer: `correction_bias` [E], zero at first. It stays float32 when the model is cast (`model.bfloat16()`), since
    steps of 0.001 are lost in a bfloat16.

    Raises:
        ValueError: num_groups does not divide num_experts into groups of two or more; topk_groups out of range, or so
            few that they hold fewer than top_k experts.
    """

    correction_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        **settings: Any,
    ) -> None:
        _check_groups(num_experts, top_k, num_groups, topk_groups)
        super().__init__(d_model, num_experts, top_k, **settings)
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.renormalize, self.scale = renormalize, scale
        self.correction_bias = nn.Buffer(torch.zeros(num_experts, device=self.weight.device))

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = logits_TE.sigmoid()
        ids_TK = self.limit_groups(scores_TE.detach() + self.correction_bias).topk(self.top_k).indices
        weights_TK = scores_TE.gather(-1, ids_TK)
        if self.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + torch.finfo(weights_TK.dtype).tiny)
        return weights_TK * self.scale, ids_TK

    def limit_groups(self, scores_TE: Tensor) -> Tensor:
        """The scores, with -inf for experts outside of a token's best groups."""
        if self.num_groups == self.topk_groups:
            return scores_TE
        grouped_TGE = scores_TE.unflatten(-1, (self.num_groups, -1))
        best_TG = grouped_TGE.topk(2).values.sum(-1).topk(self.topk_groups).indices
        outside_TG = torch.ones_like(grouped_TGE[..., 0], dtype=torch.bool).scatter(-1, best_TG, False)
        return grouped_TGE.masked_fill(outside_TG[..., None], -torch.inf).flatten(-2)

    @torch.no_grad()
    def update_correction_bias(self, tokens_per_expert: Tensor, rate: float = 0.001) -> None:
        """One step of the auxiliary-loss-free balancing: + rate for experts below the mean load, - rate above it.

        Wang et al. (arXiv 2408.15664). Call it once after each optimizer step.

        Args:
            tokens_per_expert: [E], any dtype, on the router's device, summed over the batch and over all ranks
                (`tokens_per_expert(routing.topk_ids, E)`, or the router's statistics).
            rate: the step.

        Raises:
            ValueError: tokens_per_expert is not [E].
        """
        if tokens_per_expert.shape != (self.num_experts,):
            raise ValueError(
                f"tokens_per_expert: got shape {list(tokens_per_expert.shape)}, accepted is [{self.num_experts}]"
            )
        load = tokens_per_expert.float()
        self.correction_bias += rate * (load.mean() - load).sign()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.correction_bias
        super()._apply(fn, recurse)
        if self.correction_bias.dtype != exact.dtype:
            self.correction_bias = exact.to(self.correction_bias.device)
        return self


def _check_groups(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < 2):
        raise ValueError(
            f"num_groups: got {num_groups}, accepted are divisors of num_experts = {num_experts} "
            "that leave two experts a group"
        )
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: got {topk_groups}, accepted are 1..{num_groups} (num_groups)")
    if topk_groups * (num_experts // num_groups) < top_k:
        raise ValueError(
            f"top_k: got {top_k}, accepted are 1..{topk_groups * (num_experts // num_groups)}, "
            f"the experts of {topk_groups} groups"
        )
