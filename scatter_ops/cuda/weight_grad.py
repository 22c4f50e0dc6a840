"""Launches of the per-expert reductions: weight gradients and sums of grouped rows. E experts."""

import torch
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from scatter_ops.cuda.device import dot_precision
from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.integers import cdiv, next_power_of_2
from scatter_ops.cuda.operands import Routing, Rows, grid_size, select_config, tma_can_read, unit, uses_tma
from scatter_ops.cuda.optional_hopper import hopper
from scatter_ops.kernels.weight_grad import grouped_sum_kernel, weight_grad_kernel


def weight_grad(left: Rows, right: Rows, routing: Routing, spared: int = 0) -> Tensor:
    """[E, P, Q] = left^T @ right over each expert's rows. spared: multiprocessors that Hopper's kernel leaves alone."""
    p_size, q_size = left.data.shape[1], right.data.shape[1]
    out = torch.empty(routing.num_experts, p_size, q_size, dtype=left.data.dtype, device=left.data.device)
    if out.numel() == 0:
        return out
    config = select_config("weight_grad", left.data, routing, p_size, q_size)
    if config.regroup:
        left, right = (regrouped(rows, routing) for rows in (left, right))
    if hopper is not None and hopper.launch_weight_grad(config, left, right, routing, out, spared):
        return out
    if config.overlap:  # the portable kernel can't gather beside its products
        left, right = (regrouped(rows, routing) for rows in (left, right))
    block_p, block_q = min(config.block_m, max(32, next_power_of_2(p_size))), config.block_n
    num_tiles = routing.num_experts * cdiv(p_size, block_p) * cdiv(q_size, block_q)
    left_tma, right_tma = (
        uses_tma(config, out.device) and rows.divisor == 0 and tma_can_read(rows.data) for rows in (left, right)
    )
    out_tma = config.tma_out and uses_tma(config, out.device) and tma_can_read(out[0])
    weight_grad_kernel[grid_size(config, num_tiles, out.device)](
        create_ragged_descriptor(left.data, [config.block_k, block_p]) if left_tma else left.data,
        create_ragged_descriptor(right.data, [config.block_k, block_q]) if right_tma else right.data,
        TensorDescriptor.from_tensor(out, [1, block_p, block_q]) if out_tma else out,
        routing.order_N,
        routing.offsets_E,
        routing.num_experts,
        p_size,
        q_size,
        left.data.stride(0),
        right.data.stride(0),
        LEFT_DIVISOR=left.divisor,
        RIGHT_DIVISOR=right.divisor,
        LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma,
        OUT_TMA=out_tma,
        PRECISION=dot_precision(left.data.dtype),
        UNIT=unit(left.data, p_size, q_size, left.data.stride(0), right.data.stride(0)),
        BLOCK_P=block_p,
        BLOCK_Q=block_q,
        BLOCK_ROWS=config.block_k,
        GROUP_P=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def oriented_weight_grad(grad: Rows, x: Rows, routing: Routing, transposed: bool, spared: int = 0) -> Tensor:
    """[E, out, in], or [E, in, out] if transposed."""
    left, right = (x, grad) if transposed else (grad, x)
    return weight_grad(left, right, routing, spared)


def reads_in_place(left: Rows, right: Rows, routing: Routing) -> bool:
    """Whether Hopper's kernel does weight_grad, and without a copy of rows."""
    config = select_config("weight_grad", left.data, routing, left.data.shape[1], right.data.shape[1])
    return not config.regroup and hopper is not None and hopper.weight_grad_can(config, left, right)


def grouped_sum(rows: Rows, scale: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
    """[E, columns]: sum of each expert's rows, each times scale[its slot] if given (needs a divisor)."""
    num_columns = rows.data.shape[1]
    out = torch.empty(routing.num_experts, num_columns, dtype=dtype, device=rows.data.device)
    if out.numel() == 0:
        return out
    block_columns = min(128, max(16, next_power_of_2(num_columns)))
    grouped_sum_kernel[(routing.num_experts, cdiv(num_columns, block_columns))](
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
