"""Routers that take the largest softmax probabilities.

T tokens, K experts per token, E experts.
"""

from typing import Any, Literal

from torch import Tensor

from scatter_moe.routers.router import Router


class TopKRouter(Router):
    """The K most probable experts, in either order of softmax and top-k.

    softmax="before": p = softmax(logits) over all E experts, the K largest are kept, and divided by their sum if
    `renormalize` (Mixtral, Qwen3-MoE, OLMoE without it).
    softmax="after": the K largest logits are kept, and the softmax runs over these K alone (GPT-OSS). In exact
    arithmetic that equals "before" with `renormalize`.

    Args:
        softmax: "before" or "after" top-k.
        renormalize: with "before", weights of a token sum to one. "after" does that by itself.
        d_model, num_experts, top_k and keyword arguments: see `Router`.

    Raises:
        ValueError: softmax is neither; "after" without renormalize.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        softmax: Literal["before", "after"] = "before",
        renormalize: bool = True,
        **settings: Any,
    ) -> None:
        if softmax not in ("before", "after"):
            raise ValueError(f"softmax: got {softmax!r}, accepted are 'before' and 'after' (top-k)")
        if softmax == "after" and not renormalize:
            raise ValueError("renormalize: got False with softmax='after', whose weights always sum to one")
        super().__init__(d_model, num_experts, top_k, **settings)
        self.softmax, self.renormalize = softmax, renormalize

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.softmax == "after":
            logits_TK, ids_TK = logits_TE.topk(self.top_k)
            return logits_TK.softmax(-1), ids_TK
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, ids_TK


class SwitchRouter(TopKRouter):
    """The most probable expert alone, weighted by its probability.

    Switch Transformer (arXiv 2101.03961). Not renormalised: the weight is what trains the router.

    Args:
        d_model, num_experts and keyword arguments: see `Router`.
    """

    def __init__(self, d_model: int, num_experts: int, **settings: Any) -> None:
        super().__init__(d_model, num_experts, 1, renormalize=False, **settings)
