"""scatter_moe::route: sort the slots by expert. Not differentiable."""

import torch
from torch import Tensor

from registrations.library import define, fake, kernels
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, divisible, sharding
from scatter_ops import checks

define("route(Tensor topk_ids, int num_experts) -> (Tensor order, Tensor offsets)")
kernels("route", checks.route, planned=True)


@fake("route", checks.route)
def route_fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return topk_ids.new_empty(topk_ids.numel(), dtype=torch.int32), topk_ids.new_empty(num_experts, dtype=torch.int32)


@sharding("route", 1)
def route_sharding(topk_ids: Placed, num_experts: int) -> Division:
    if topk_ids.placement != 0:
        return [REPLICATED, REPLICATED], [REPLICATED]
    divisible("topk_ids", topk_ids.shape[0], topk_ids.ranks)
    return [0, PARTIAL], [0]
