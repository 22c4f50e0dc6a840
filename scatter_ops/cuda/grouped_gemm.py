"""The grouped GEMM inside linear, mlp_forward and mlp_backward."""

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from scatter_ops.cuda.integers import cdiv
from scatter_ops.cuda.operands import (
    Routing,
    Rows,
    grid_size,
    product_options,
    select_config,
    tma_can_read,
    uses_tma,
)
from scatter_ops.cuda.optional_hopper import hopper
from scatter_ops.cuda.parameters import ExpertBias, ExpertWeight
from scatter_ops.cuda.recording import launch
from scatter_ops.kernels.grouped_gemm import grouped_gemm_kernel

NO_BIAS = ExpertBias(None, 0, "none")


def grouped_gemm(
    rows: Rows, weight: ExpertWeight, bias: ExpertBias, routing: Routing, scatter: bool, zero_unrouted: bool
) -> Tensor:
    """out [N, n]: row i of the grouped rows (or its slot if scatter) times its expert's weight, plus bias.

    zero_unrouted: write zeros to the rows of sentinel slots; they stay undefined otherwise.
    """
    num_slots = routing.num_slots
    out = torch.empty(num_slots, weight.n, dtype=rows.data.dtype, device=rows.data.device)
    if out.numel() == 0:
        return out
    config = select_config("grouped_gemm", rows.data, routing, weight.n, weight.k, weight.stride_k == 1)
    tiles = routing.schedule(config.block_m)
    num_zeroed = num_slots if zero_unrouted else 0
    out_tma = config.tma_out and not scatter and uses_tma(config, out.device) and tma_can_read(out)
    operands = rows, weight, bias, routing, tiles, out, num_zeroed
    if hopper is not None and out_tma and hopper.launch_grouped_gemm(config, *operands):
        return out
    x, w, options = product_options(rows, weight, config, config.block_n, n_ways=1)
    grid = grid_size(config, tiles.max_row_tiles * cdiv(weight.n, config.block_n), out.device)
    launch(
        grouped_gemm_kernel,
        grid,
        x,
        w,
        bias.data,
        create_ragged_descriptor(out, [config.block_m, config.block_n]) if out_tma else out,
        out,
        routing.order_N,
        routing.offsets_E,
        tiles.tile_map,
        num_zeroed,
        routing.num_experts,
        weight.n,
        weight.k,
        rows.data.stride(0),
        *weight.strides,
        bias.stride_e,
        out.stride(0),
        X_DIVISOR=rows.divisor,
        SCATTER=scatter,
        BIAS=bias.kind,
        K_WAYS=weight.ways,
        OUT_TMA=out_tma,
        BLOCK_N=config.block_n,
        **options,
    )
    return out
