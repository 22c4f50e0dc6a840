"""Other implementations of one expert MLP (SwiGLU, stacked weights), each with the signature of `Implementation`.

    y = forward(x, topk_weights, topk_ids, gate_up, down)       differentiable in all but topk_ids

`available` yields those that can run here and says in one line why another can't.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from registrations.library import OPS

Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
PACKAGES = {  # packages without an adapter here; their rows would need the module that each builds
    "scattermoe": "scattermoe",
    "sonicmoe": "sonicmoe",
    "megablocks": "megablocks",
    "triton_kernels": "triton_kernels",
    "moe_ops": "moe-ops",
}


def scatter_moe(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    order, offsets = OPS.route(topk_ids, down.shape[0])
    return OPS.mlp(x, topk_weights, order, offsets, [gate_up], [], [down], [], [], [], "silu", "concatenated")


def grouped_mm(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort, gather, torch's grouped_mm twice, scatter back and sum: the usual recipe in plain PyTorch."""
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


def transformers_grouped_mm() -> Implementation:
    """transformers' default for experts: its Qwen3-MoE module with the grouped_mm recipe."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    class Experts(torch.nn.Module):
        has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
        has_post_expert_norm = _is_expert_parallel = False

        def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
            gate, up = gate_up_out.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        module = Experts()
        # Plain attributes: as parameters they would be leaves of their own.
        for name, value in (("num_experts", down.shape[0]), ("gate_up_proj", gate_up), ("down_proj", down)):
            object.__setattr__(module, name, value)
        return grouped_mm_experts_forward(module, x, topk_ids, topk_weights)

    return forward


def available() -> Iterator[tuple[str, Implementation]]:
    """Name and implementation of each rival that can run here."""
    if hasattr(torch.nn.functional, "grouped_mm"):
        yield "grouped_mm", grouped_mm
        yield "grouped_mm, compiled", torch.compile(grouped_mm)
    else:
        print("skipped: grouped_mm (this PyTorch has no torch.nn.functional.grouped_mm)")
    try:
        yield "transformers", transformers_grouped_mm()
    except ImportError as error:
        print(f"skipped: transformers ({error})")
    for module, package in PACKAGES.items():
        installed = importlib.util.find_spec(module) is not None
        print(f"skipped: {package} ({'there is no adapter for it yet' if installed else 'not installed'})")
