"""`MoE`: router, experts and an optional shared expert as one layer.

T tokens, K experts per token, E experts, D model width.
"""

from torch import Tensor, nn

from scatter_moe.arguments import chooses_among, has_chosen
from scatter_moe.routers import Routing


class MoE(nn.Module):
    """`y = experts(x, router(x)) + shared_expert(x)`.

    Args:
        router: a module whose `router(x_TD)` is a `scatter_moe.routers.Routing`, or anything with its `topk_ids` and
            `topk_weights`.
        experts: a module whose `experts(x_TD, topk_ids, topk_weights)` gives `[T, D]`, as `ExpertMLP` does.
        shared_expert: a module for all tokens, `[T, D]` to `[T, D]`, whose result is added.

    Raises:
        ValueError: for a router of another number of experts, where both have `num_experts`.

    Source: Shazeer et al. (arXiv 1701.06538); the shared expert is DeepSeekMoE's (arXiv 2401.06066).
    """

    def __init__(self, router: nn.Module, experts: nn.Module, shared_expert: nn.Module | None = None) -> None:
        super().__init__()
        if isinstance(num_experts := getattr(experts, "num_experts", None), int):
            chooses_among(router, num_experts)
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.forward_with_routing(x)[0]

    def forward_with_routing(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Also returns what the router returned, for auxiliary losses and statistics."""
        x_TD = x.flatten(0, -2)
        routed: Routing = self.router(x_TD)
        has_chosen(routed)
        y_TD = self.experts(x_TD, routed.topk_ids, routed.topk_weights)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return y_TD.view_as(x), routed
