"""Noisy top-k gating: trainable noise on the logits spreads tokens over experts.

T tokens, K experts per token, E experts, D model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatter_moe.routers.router import Router, Routing, at_least_float32


class NoisyTopKRouter(Router):
    """H = x W^T + normal noise * softplus(x W_noise^T); the K largest of H, softmax over them.

    The noisy top-k gating of Shazeer et al. (arXiv 1701.06538). Noise is drawn in training alone. Balance is kept by
    `importance_loss(routing)` and by the load loss of that paper, `cv_squared(router.expected_load(x, routing))`.

    Args:
        d_model, num_experts, top_k (below num_experts) and keyword arguments: see `Router`.

    Parameters: `weight` and `noise_weight`, both [E, D] and zero at first, so that training starts with equal loads,
    as in the paper. The `logits` of a `Routing` are H, noise included.

    Raises:
        ValueError: top_k is num_experts: noise could change nothing.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, **settings: Any) -> None:
        if top_k == num_experts:
            raise ValueError(f"top_k: got {top_k}, accepted are 1..{num_experts - 1}, fewer than num_experts")
        super().__init__(d_model, num_experts, top_k, **settings)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if hasattr(self, "noise_weight"):
            nn.init.zeros_(self.noise_weight)

    def score(self, x_TD: Tensor) -> Tensor:
        clean_TE = super().score(x_TD)
        if not self.training:
            return clean_TE
        return clean_TE + torch.randn_like(clean_TE) * self.noise_scale(x_TD)

    def noise_scale(self, x_TD: Tensor) -> Tensor:
        """Standard deviation [T, E] of the noise on each logit: softplus(x W_noise^T)."""
        dtype = self.logits_dtype or self.weight.dtype
        return F.softplus(at_least_float32(F.linear(x_TD.to(dtype), self.noise_weight.to(dtype))))

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        logits_TK, ids_TK = logits_TE.topk(self.top_k)
        return logits_TK.softmax(-1), ids_TK

    def expected_load(self, x: Tensor, routing: Routing) -> Tensor:
        """A differentiable estimate [E] of how many tokens each expert gets.

        The sum over tokens of the probability that expert i is among the K largest if its noise alone were drawn again:
        the load estimator of the paper.

        Args:
            x: [..., D], what the router was called with (without jitter).
            routing: what it returned.
        """
        x_TD = x.reshape(-1, self.d_model)
        largest_TK = routing.logits.topk(self.top_k + 1).values
        last_in_T1, first_out_T1 = largest_TK[:, -2:-1], largest_TK[:, -1:]
        threshold_TE = torch.where(routing.logits >= last_in_T1, first_out_T1, last_in_T1)
        margin_TE = (super().score(x_TD) - threshold_TE) / self.noise_scale(x_TD)
        return torch.special.ndtr(margin_TE).sum(0)
