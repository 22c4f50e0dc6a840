"""Auxiliary losses of routers.

T tokens, K experts per token, E experts, B sequences of S tokens each.
"""

from typing import Literal

import torch
from torch import Tensor

from scatter_moe.routers.router import Routing


def tokens_per_expert(topk_ids: Tensor, num_experts: int) -> Tensor:
    """How many slots go to each expert: int32 [E]. Ids outside 0..E-1 count nowhere; no wait for the device.

    Args:
        topk_ids: [T, K], int32 or int64.
        num_experts: E.
    """
    _, offsets_E = torch.ops.scatter_moe.route(topk_ids, num_experts)
    return offsets_E.diff(prepend=offsets_E.new_zeros(1))


def load_balancing_loss(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score: Literal["softmax", "sigmoid"] = "softmax",
    mask: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """E * sum_i f_i P_i: f_i the share of slots that want expert i, P_i its mean probability. One if all is even.

    The auxiliary loss of Switch Transformer (arXiv 2101.03961), for any K; `load_balancing_loss_func` of transformers'
    Mixtral doesn't divide by K and is K times this. score="sigmoid" with `sequences` is the sequence-wise loss of
    DeepSeek-V3 (arXiv 2412.19437). Slots that a capacity dropped count for the expert they wanted.

    Args:
        logits: [T, E]; gradients go through P alone.
        topk_ids: [T, K].
        score: how logits become probabilities: softmax, or sigmoids divided by their sum.
        mask: bool [T], False for padding, which doesn't count.
        sequences: B; the loss of each of B consecutive sequences of T / B tokens is computed, and averaged.

    Returns:
        A scalar of the logits' dtype, float32 at least.

    Raises:
        ValueError: score is neither; sequences does not divide T.
    """
    num_tokens, num_experts = logits.shape
    if num_tokens % sequences:
        raise ValueError(f"sequences: got {sequences}, accepted are divisors of the number of tokens, {num_tokens}")
    probabilities_TE = _probabilities(logits, score)
    mask_T = logits.new_ones(num_tokens, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    counted_B = mask_T.view(sequences, -1).sum(-1).clamp(min=1)

    sequence_B1 = torch.arange(sequences, device=logits.device)[:, None]
    wanted_BN = (topk_ids % num_experts).reshape(sequences, -1) + sequence_B1 * num_experts
    mask_BN = mask_T[:, None].expand_as(topk_ids).reshape(sequences, -1)
    wanted_BN = torch.where(mask_BN, wanted_BN, sequences * num_experts)
    slots_BE = tokens_per_expert(wanted_BN, sequences * num_experts).view(sequences, num_experts)

    share_BE = slots_BE / (topk_ids.shape[1] * counted_B[:, None])
    masked_TE = torch.where(mask_T[:, None], probabilities_TE, 0.0)
    mean_BE = masked_TE.reshape(sequences, -1, num_experts).sum(1) / counted_B[:, None]
    return num_experts * (share_BE * mean_BE).sum(-1).mean()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits) squared: keeps logits small.

    ST-MoE (arXiv 2202.08906).

    Args:
        logits: [T, E].
        mask: bool [T], False for padding, which doesn't count.
    """
    squares_T = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square()
    if mask is None:
        return squares_T.mean()
    mask_T = mask.reshape(-1).bool()
    return torch.where(mask_T, squares_T, 0.0).sum() / mask_T.sum().clamp(min=1)


def importance_loss(routing: Routing) -> Tensor:
    """Squared coefficient of variation of the sum of weights that each expert gets.

    Shazeer et al. (arXiv 1701.06538).
    """
    num_tokens, num_experts = routing.logits.shape
    # Ids of a token are distinct, so nothing is added up in the scatter and the sum repeats bitwise.
    dense_TE = routing.topk_weights.new_zeros(num_tokens, 2 * num_experts)
    dense_TE = dense_TE.scatter(1, routing.topk_ids, routing.topk_weights)
    return cv_squared(dense_TE[:, :num_experts].sum(0))


def cv_squared(load: Tensor) -> Tensor:
    """Squared coefficient of variation, var / mean ** 2, of [E] loads: zero if all are equal.

    Shazeer et al. (arXiv 1701.06538). The variance is the population's.
    """
    load = load.to(torch.promote_types(load.dtype, torch.float32))
    mean = load.mean()
    return (load - mean).square().mean() / mean.square().clamp(min=torch.finfo(load.dtype).tiny)


def _probabilities(logits: Tensor, score: str) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score == "softmax":
        return logits.softmax(-1)
    if score == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    raise ValueError(f"score: got {score!r}, accepted are 'softmax' and 'sigmoid'")
