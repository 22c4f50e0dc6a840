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
    """github.com/Dao-AILab/sonic-moe: its layer after the top-k, rows of gate and up in turns."""
    from sonicmoe import functional  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    def forward(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        (num_tokens, top_k), num_experts = topk_ids.shape, down.shape[0]
        ids, stream = topk_ids.int(), torch.cuda.current_stream().cuda_stream
        _, ends = functional.count_cumsum(ids.view(-1), num_experts, do_cumsum=True)
        offsets, *indices = functional.TC_topk_router_metadata(ids, ends, top_k)
        up = gate_up.permute(1, 2, 0), None, offsets, num_tokens * top_k, top_k, stream
        options = False, ActivationType.SWIGLU
        y1, z = functional._UpProjection.apply(x, *up, *indices, *options, not torch.is_grad_enabled())
        routed = down.permute(1, 2, 0), None, topk_weights, offsets, num_tokens, top_k, stream
        return functional._DownProjection.apply(y1, z, *routed, *indices, *options)

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
