"""`MixtureOfAttention`: each token chooses the experts that make its queries and that read its attention's result.

B sequences, S positions, T = B * S tokens, L keys (S and those in the cache), K experts per token, N = T * K slots,
E experts, D model width, H heads of an expert, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatter_moe.arguments import chooses_among, has_chosen
from scatter_moe.dispatch import Dispatch
from scatter_moe.parallel_linear import ParallelLinear
from scatter_moe.rotary import rotate


class KVCache:
    """Keys and values `[B, H, L, d]` of the tokens seen so far, for decoding token by token."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """L."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens `[B, H, S, d]` and returns all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


class MixtureOfAttention(nn.Module):
    """Mixture of multi-head attention (MoMHA): a token's K experts give it K * H query heads.

    Every expert has its own query and output projection. The keys and values of H heads are shared by all experts:
    head i of each expert attends to head i of these. One routing serves both projections, and the router's weights
    scale what the output projections give:

        out[t] = sum_k s[t, k] * Attention(x[t] W_q[e_k], keys, values) W_o[e_k]

    Args:
        router: a module whose `router(x_TD)` has `topk_ids` and `topk_weights`, as for `MoE`.
        d_model: D.
        num_experts: E.
        num_heads: H, heads of one expert.
        head_dim: d.
        bias: whether the four projections have one.
        causal: whether a token attends only to itself and earlier ones.
        rope_theta: base of rotary position embeddings; None for none.
        device, dtype: of the parameters.

    Raises:
        ValueError: for an odd head_dim with rope_theta; for a router of another number of experts, or no experts.

    Source: the Mixture of Multi-head Attention of ScatterMoE (arXiv 2403.08245), after Mixture of Attention Heads
    (arXiv 2210.05144).
    """

    def __init__(
        self,
        router: nn.Module,
        d_model: int,
        num_experts: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        causal: bool = True,
        rope_theta: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"head_dim: got {head_dim} with rope_theta, accepted are even numbers")
        chooses_among(router, num_experts)
        self.num_experts, self.num_heads, self.head_dim = num_experts, num_heads, head_dim
        self.causal, self.rope_theta = causal, rope_theta
        width = num_heads * head_dim
        self.router = router
        self.q_proj = ParallelLinear(num_experts, d_model, width, bias, device, dtype)
        self.k_proj = nn.Linear(d_model, width, bias, device, dtype)
        self.v_proj = nn.Linear(d_model, width, bias, device, dtype)
        self.o_proj = ParallelLinear(num_experts, width, d_model, bias, device, dtype)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Attention of each token over its sequence.

        Args:
            x: `[B, S, D]`, of the parameters' dtype.
            attention_mask: bool or integers `[B, L]`, zero at padding. Positions are counted without padding. What
                comes out at padding positions is finite and means nothing.
            cache: keys and values of earlier tokens. Those of x are added to it.

        Returns:
            `[B, S, D]`.

        Raises:
            ValueError: for x or an attention_mask of another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.q_proj.in_features:
            accepted = f"[B, S, {self.q_proj.in_features}]"
            raise ValueError(f"x: got shape {tuple(x.shape)}, accepted is {accepted}")
        past = 0 if cache is None else cache.length
        shape = x.shape[0], past + x.shape[1]
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask: got shape {tuple(attention_mask.shape)}, accepted is {tuple(shape)}")
        x_TD = x.flatten(0, 1)
        routed = self.router(x_TD)
        has_chosen(routed)
        dispatch = Dispatch.of_ids(routed.topk_ids, self.num_experts)
        q_BHKSd = self._queries(x, dispatch)
        keys, values = (self._heads(projection(x)) for projection in (self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            positions = _positions(x, attention_mask, past)
            q_BHKSd = rotate(q_BHKSd.flatten(1, 2), positions, self.rope_theta).view_as(q_BHKSd)
            keys = rotate(keys, positions, self.rope_theta)
        if cache is not None:
            keys, values = cache.append(keys, values)
        y_ND = self.o_proj(self._attend(q_BHKSd, keys, values, attention_mask), dispatch, rows_in="slots")
        order, offsets, top_k = dispatch
        return torch.ops.scatter_moe.combine(y_ND, routed.topk_weights, order, offsets, top_k, False).view_as(x)

    def _queries(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """`[B, H, K, S, d]`: the K choices of a head are neighbours, as `enable_gqa` wants queries that share keys."""
        q = self.q_proj(x.flatten(0, 1), dispatch)
        return q.view(*x.shape[:2], dispatch.top_k, self.num_heads, self.head_dim).permute(0, 3, 2, 1, 4)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(self, q_BHKSd: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Attention in slot order, `[N, H * d]`."""
        mask = _mask(q_BHKSd.shape[3], keys, attention_mask, self.causal)
        is_causal = self.causal and mask is None and q_BHKSd.shape[3] > 1
        y = F.scaled_dot_product_attention(
            q_BHKSd.flatten(1, 2), keys, values, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )
        y_BSKHd = y.view_as(q_BHKSd).permute(0, 3, 2, 1, 4)
        return y_BSKHd.reshape(-1, self.num_heads * self.head_dim)


def _positions(x: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """Of the tokens of x in their sequences, `[B, S]` or `[1, S]`."""
    if attention_mask is None:
        return torch.arange(past, past + x.shape[1], device=x.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def _mask(num_queries: int, keys: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor | None:
    """bool `[B or 1, 1, S, L]`, which query may attend to which key; None where SDPA's own `is_causal` says it all.

    A query may always attend to itself, so that no row of the softmax is empty.
    """
    num_keys = keys.shape[2]
    if attention_mask is None and (not causal or num_queries in (1, num_keys)):
        return None
    key = torch.arange(num_keys, device=keys.device)
    query = torch.arange(num_keys - num_queries, num_keys, device=keys.device)[:, None]
    allowed = key <= query if causal else torch.ones_like(key <= query)
    if attention_mask is None:
        return allowed[None, None]
    return ((allowed & attention_mask.bool()[:, None]) | (key == query))[:, None]
