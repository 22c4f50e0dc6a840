"""Live statistics of routers, counted on the device: nothing here waits for it.

T tokens, K experts per token, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from scatter_moe.routers.capacity import CapacityRouter
from scatter_moe.routers.losses import tokens_per_expert
from scatter_moe.routers.router import Router, Routing


class Snapshot(NamedTuple):
    """What was counted since the last reset: tensors on the router's device.

    Attributes:
        tokens_per_expert: int64 [E], slots that each expert computed.
        entropy: scalar in nats, of softmax(logits), averaged over tokens: 0 is certain, log E knows nothing.
        dropped_share: scalar, share of slots that nobody computed (over capacity, or second choices that GShard left
            out).
        dead_experts: int64 scalar, experts that computed nothing.
    """

    tokens_per_expert: Tensor
    entropy: Tensor
    dropped_share: Tensor
    dead_experts: Tensor


class RouterStatistics(nn.Module):
    """Counts what a router does, in buffers that are no part of the state dict.

    Called with each `Routing`, also inside a compiled graph. The counts are this process's own: add them up over ranks
    where the batch is split. Where activation checkpointing runs a forward twice it counts twice, shares stay right.

    Args:
        num_experts: E.
        device: where the router is.
    """

    tokens_per_expert: Tensor
    entropy_sum: Tensor
    tokens: Tensor
    slots: Tensor

    def __init__(self, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        for name, shape, dtype in (
            ("tokens_per_expert", (num_experts,), torch.int64),
            ("entropy_sum", (), torch.float64),
            ("tokens", (), torch.int64),
            ("slots", (), torch.int64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    @torch.no_grad()
    def forward(self, routing: Routing) -> None:
        log_p_TE = routing.logits.detach().log_softmax(-1)
        # A logit of -inf has probability zero and adds nothing, where 0 * -inf would be NaN.
        self.entropy_sum += -torch.where(log_p_TE.isneginf(), 0.0, log_p_TE.exp() * log_p_TE).sum()
        self.tokens_per_expert += tokens_per_expert(routing.topk_ids, self.num_experts)
        self.tokens += routing.topk_ids.shape[0]
        self.slots += routing.topk_ids.numel()

    def snapshot(self) -> Snapshot:
        """Everything counted since the last reset, as new tensors: later steps don't change them."""
        computed = self.tokens_per_expert.sum()
        return Snapshot(
            self.tokens_per_expert.clone(),
            self.entropy_sum / self.tokens.clamp(min=1),
            1 - computed / self.slots.clamp(min=1),
            (self.tokens_per_expert == 0).sum(),
        )

    def reset(self) -> None:
        for counter in self.buffers():
            counter.zero_()


def track(model: nn.Module) -> dict[str, RouterStatistics]:
    """Gives each router of a model its statistics; returns them by the router's name.

    A router inside a `CapacityRouter` is counted after its capacity, under the name of the latter. Call it before
    compiling. Tracking a model again starts new counts; `router.statistics = None` stops them.

    Raises:
        ValueError: the model has no router of this package.
    """
    limited = {module.router for module in model.modules() if isinstance(module, CapacityRouter)}
    tracked = {}
    for name, module in model.named_modules():
        if isinstance(module, Router | CapacityRouter) and module not in limited:
            router = module.router if isinstance(module, CapacityRouter) else module
            module.statistics = tracked[name] = RouterStatistics(module.num_experts, router.weight.device)
    if not tracked:
        raise ValueError(f"model: got {type(model).__name__} without a Router or CapacityRouter")
    return tracked
