"""The expert MLP in plain PyTorch and as transformers has it. Each function raises ImportError if it can't run here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def grouped_mm() -> Callable[..., Tensor]:
    """Sort, gather, torch's grouped_mm twice, scatter back and sum: the usual recipe in plain PyTorch."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        raise ImportError("this PyTorch has no torch.nn.functional.grouped_mm")

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        top_k, num_experts = topk_ids.shape[1], down.shape[0]
        expert, order = topk_ids.flatten().sort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
        offsets = counts.index_add(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        h = torch.nn.functional.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=offsets)
        gate, up = h.chunk(2, dim=-1)
        y = torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=offsets)
        y = y * topk_weights.flatten()[order, None].to(y.dtype)
        slots = torch.zeros_like(y).index_copy(0, order, y)
        return slots.view(-1, top_k, slots.shape[-1]).sum(1)

    return forward


def transformers() -> Callable[..., Tensor]:
    """transformers' default for experts: its Qwen3-MoE module with the grouped_mm recipe."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    class Experts:
        """What the recipe reads of its module. Parameters of a module would be leaves of their own."""

        has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
        has_post_expert_norm = _is_expert_parallel = False

        def __init__(self, gate_up: Tensor, down: Tensor) -> None:
            self.num_experts, self.gate_up_proj, self.down_proj = down.shape[0], gate_up, down

        def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
            gate, up = gate_up_out.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        experts: Any = Experts(gate_up, down)
        return grouped_mm_experts_forward(experts, x, topk_ids, topk_weights)

    return forward
