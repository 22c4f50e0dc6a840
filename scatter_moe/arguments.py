"""Errors for wrong arguments of the layers, which the operators would not see or would not name.

Each names the argument, what was given and what is accepted.
"""

from numbers import Integral

from torch import Tensor, nn


def at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral):
            raise TypeError(f"{name}: got {size!r}, accepted are whole numbers")
        if size < 1:
            raise ValueError(f"{name}: got {size}, accepted is at least 1")


def one_count_per_expert(num_tokens_per_expert: Tensor, num_experts: int) -> None:
    if not isinstance(num_tokens_per_expert, Tensor):
        raise TypeError(f"num_tokens_per_expert: got {type(num_tokens_per_expert).__name__}, accepted is a tensor")
    if num_tokens_per_expert.shape != (num_experts,):
        shape = tuple(num_tokens_per_expert.shape)
        raise ValueError(f"num_tokens_per_expert: got shape {shape}, accepted is ({num_experts},), one count an expert")


def chooses_among(router: nn.Module, num_experts: int) -> None:
    """Ids of experts that don't exist are sentinels: without this check their slots would silently give nothing."""
    chosen = getattr(router, "num_experts", num_experts)
    if chosen != num_experts:
        raise ValueError(f"router: got one of {chosen} experts, accepted is one of {num_experts}, as many as there are")


def has_chosen(routed: object) -> None:
    """Said of what a router returned: a layer takes any module for one."""
    if not (hasattr(routed, "topk_ids") and hasattr(routed, "topk_weights")):
        raise TypeError(
            f"router: got one that returns {type(routed).__name__}, accepted is one that returns a "
            "scatter_moe.routers.Routing, or anything with topk_ids and topk_weights"
        )
