"""Packages for Mixture of Experts, by what each offers between its router and y.

Each function raises ImportError if its package isn't installed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu


def scattermoe() -> Callable[..., Tensor]:
    """github.com/shawntan/scattermoe: its GLU MLP, gate and up the other way round."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # pyright: ignore[reportMissingImports]

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        routing = flatten_sort_count(topk_ids, num_experts=down.shape[0])
        h = parallel_linear(x, gate_up.mT, topk_ids.shape[1], *routing, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        gates = topk_weights.to(x.dtype)
        return parallel_linear(silu(gate) * up, down.mT, 1, *routing, grouped_in=True, gates=gates)

    return forward


def sonicmoe() -> Callable[..., Tensor]:
    """github.com/Dao-AILab/sonic-moe 0.1.2: its layer after the top-k, rows of gate and up in turns.

    It tunes its products on first use, which takes minutes.
    """
    from sonicmoe import functional  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        (num_tokens, top_k), num_experts = topk_ids.shape, down.shape[0]
        num_slots = num_tokens * top_k
        sizes = (num_experts, num_experts + 1, num_slots, num_slots, num_slots)
        counts, offsets, *rows = (torch.empty(size, dtype=torch.int32, device=x.device) for size in sizes)
        functional.TC_topk_router_metadata_triton(topk_ids.int(), num_experts, counts, offsets, *rows)
        up = gate_up.permute(1, 2, 0), None, offsets, num_slots, top_k
        same_experts = None, False, ActivationType.SWIGLU
        y1, h = functional._UpProjection.apply(x, *up, *rows, *same_experts, not torch.is_grad_enabled())
        routed = down.permute(1, 2, 0), None, topk_weights, offsets, num_tokens, top_k
        return functional._DownProjection.apply(y1, h, *routed, *rows, *same_experts)

    return forward


def megablocks() -> Callable[..., Tensor]:
    """github.com/databricks/megablocks: the steps of its dMoE with `mlp_impl="grouped"`, gate and up in one product."""
    from grouped_gemm.ops import gmm  # pyright: ignore[reportMissingImports]
    from megablocks import ops  # pyright: ignore[reportMissingImports]

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        expert, top_k, num_experts = topk_ids.flatten().int(), topk_ids.shape[1], down.shape[0]
        with torch.no_grad():
            bin_ids, indices = ops.sort(expert, (num_experts - 1).bit_length())
            counts = ops.histogram(expert, num_experts)
            bins = ops.inclusive_cumsum(counts, 0)
        sizes = counts.cpu().long()
        h = gmm(ops.gather(x, indices, bin_ids, bins, top_k), gate_up, sizes, trans_b=True)
        gate, up = h.chunk(2, dim=-1)
        y = gmm(silu(gate) * up, down, sizes, trans_b=True)
        return ops.scatter(y, indices, bin_ids, topk_weights.flatten(), bins, top_k)

    return forward


def moe_ops() -> Callable[..., Tensor]:
    """The package moe-ops: permute, its grouped GEMM twice, unpermute."""
    import moe_ops  # pyright: ignore[reportMissingImports]

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        num_tokens, top_k = topk_ids.shape
        rows, row_id_map, offsets = moe_ops.permute(x, topk_ids.int(), E=down.shape[0])
        gate, up = moe_ops.grouped_gemm(rows, gate_up, offsets).chunk(2, dim=-1)
        y = moe_ops.grouped_gemm(silu(gate) * up, down, offsets)
        return moe_ops.unpermute(y, row_id_map, topk_weights, num_tokens, top_k)

    return forward


def triton_kernels() -> Callable[..., Tensor]:
    """The package beside Triton's sources; forward alone."""
    from benchmarks.rivals import triton_kernels_mlp

    return triton_kernels_mlp.forward
