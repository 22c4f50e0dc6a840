"""Launches of the per-expert reductions: weight gradients and sums of grouped rows. E experts."""

import torch
import triton
from torch import Tensor

from scatter_ops.cuda.device import dot_precision
from scatter_ops.cuda.grouped_gemm import Routing, Rows, select_config
from scatter_ops.kernels.weight_grad import grouped_sum_kernel, weight_grad_kernel


def weight_grad(left: Rows, right: Rows, routing: Routing) -> Tensor:
    """[E, P, Q] = left^T @ right over each expert's rows."""
    p_size, q_size = left.data.shape[1], right.data.shape[1]
    out = torch.empty(routing.num_experts, p_size, q_size, dtype=left.data.dtype, device=left.data.device)
    if out.numel() == 0:
        return out
    config = select_config("weight_grad", left.data, routing, p_size, q_size)
    block_p, block_q = min(config.block_m, max(32, triton.next_power_of_2(p_size))), config.block_n
    num_tiles = routing.num_experts * triton.cdiv(p_size, block_p) * triton.cdiv(q_size, block_q)
    weight_grad_kernel[(num_tiles,)](
        left.data,
        right.data,
        out,
        routing.order_N,
        routing.offsets_E,
        p_size,
        q_size,
        left.data.stride(0),
        right.data.stride(0),
        NUM_EXPERTS=routing.num_experts,
        LEFT_DIVISOR=left.divisor,
        RIGHT_DIVISOR=right.divisor,
        PRECISION=dot_precision(left.data.dtype),
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_ROWS=config.block_k,
        GROUP_P=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def grouped_sum(rows: Rows, scale: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
    """[E, columns]: sum of each expert's rows, each times scale[its slot] if given (needs a divisor)."""
    num_columns = rows.data.shape[1]
    out = torch.empty(routing.num_experts, num_columns, dtype=dtype, device=rows.data.device)
    if out.numel() == 0:
        return out
    block_columns = min(128, max(16, triton.next_power_of_2(num_columns)))
    grouped_sum_kernel[(routing.num_experts, triton.cdiv(num_columns, block_columns))](
        rows.data,
        scale,
        out,
        routing.order_N,
        routing.offsets_E,
        num_columns,
        rows.data.stride(0),
        DIVISOR=rows.divisor,
        BLOCK_ROWS=32,
        BLOCK_COLUMNS=block_columns,
    )
    return out
