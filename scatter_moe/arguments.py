"""Errors for wrong arguments of the layers, which the operators would not see or would not name.

Each names the argument, what was given and what is accepted.
"""

from torch import nn


def at_least_one_expert(num_experts: int) -> None:
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, accepted is at least 1")


def chooses_among(router: nn.Module, num_experts: int) -> None:
    """Ids of experts that don't exist are sentinels: without this check their slots would silently give nothing."""
    chosen = getattr(router, "num_experts", num_experts)
    if chosen != num_experts:
        raise ValueError(f"router: got one of {chosen} experts, accepted is one of {num_experts}, as many as there are")
