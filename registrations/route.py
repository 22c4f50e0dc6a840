"""scatter_moe::route: sort the slots by expert. Not differentiable."""

import torch
from torch import Tensor

from registrations.library import define, fake, kernels
from scatter_ops import checks

define("route(Tensor topk_ids, int num_experts) -> (Tensor order, Tensor offsets)")
kernels("route", checks.route)


@fake("route", checks.route)
def route_fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return topk_ids.new_empty(topk_ids.numel(), dtype=torch.int32), topk_ids.new_empty(num_experts, dtype=torch.int32)
