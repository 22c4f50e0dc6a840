"""Gradients of per-expert parameters: reductions over each expert's rows, in a fixed order.

    weight_grad[e] = left[rows of e]^T @ right[rows of e]          bias_grad[e] = sum of grad[rows of e]

Rows are read grouped or gathered by index; an expert without rows gets exact zeros.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.mainloop import as_multiple, rounded_operand, tile_position
from scatter_ops.kernels.ragged import load_rows


@triton.jit
def _expert_rows(offsets_ptr, expert):
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(offsets_ptr + expert)


@triton.jit
def _slots_or_rows(order_ptr, rows, valid, GATHERED: tl.constexpr):
    if GATHERED:
        result = tl.load(order_ptr + rows, mask=valid, other=0)
    else:
        result = rows
    return result


@triton.jit
def _operand_rows(grouped_rows, slots, DIVISOR: tl.constexpr):
    if DIVISOR == 0:
        result = grouped_rows
    else:
        result = slots // DIVISOR
    return result.to(tl.int64)


@triton.jit
def _load_operand(
    operand, span, DIVISOR: tl.constexpr, TMA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK_ROWS, BLOCK], zero beyond the expert's rows (clipped by hardware if TMA) and the last column.

    operand = (its memory, first column, number of columns, stride), span = (first row, end of the rows, rows, slots).
    """
    memory, first_column, size, stride = operand
    first, end, rows, slots = span
    if TMA:
        tile = load_rows(memory, first, end, first_column, BLOCK_ROWS, BLOCK)
    else:
        columns = first_column + tl.arange(0, BLOCK)
        pointers = memory + _operand_rows(rows, slots, DIVISOR)[:, None] * stride + columns[None, :]
        tile = tl.load(pointers, mask=(rows < end)[:, None] & (columns < size)[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=["num_experts"])
def weight_grad_kernel(
    left,
    right,
    out,
    order_ptr,
    offsets_ptr,
    num_experts,
    p_size,
    q_size,
    stride_left,
    stride_right,
    LEFT_DIVISOR: tl.constexpr,
    RIGHT_DIVISOR: tl.constexpr,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    """out [E, P, Q]. A divisor of 0 reads an operand's rows grouped, another reads row slot // divisor.

    An operand is a pointer, or a ragged descriptor (of grouped rows) if its TMA flag is set; so is out, not ragged.
    UNIT divides all sizes and strides.
    """
    GATHERED: tl.constexpr = LEFT_DIVISOR + RIGHT_DIVISOR > 0
    p_tiles = tl.cdiv(p_size, BLOCK_P)
    q_tiles = tl.cdiv(q_size, BLOCK_Q)
    tiles_per_expert = p_tiles * q_tiles
    block = tl.arange(0, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), num_experts * tiles_per_expert, tl.num_programs(0)):
        expert = tile // tiles_per_expert
        p_tile, q_tile = tile_position(tile - expert * tiles_per_expert, p_tiles, q_tiles, GROUP_P)
        first_p = p_tile * BLOCK_P
        first_q = q_tile * BLOCK_Q
        start, end = _expert_rows(offsets_ptr, expert)
        acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
        # Indices are loaded one iteration ahead: loaded where they are used, they would cost a stage of the pipeline.
        slots = _slots_or_rows(order_ptr, start + block, start + block < end, GATHERED)
        p_side = (left, first_p, as_multiple(p_size, UNIT), as_multiple(stride_left, UNIT))
        q_side = (right, first_q, as_multiple(q_size, UNIT), as_multiple(stride_right, UNIT))
        for first in range(start, end, BLOCK_ROWS):
            rows = first + block
            span = (first, end, rows, slots)
            left_tile = _load_operand(p_side, span, LEFT_DIVISOR, LEFT_TMA, BLOCK_ROWS, BLOCK_P)
            right_tile = _load_operand(q_side, span, RIGHT_DIVISOR, RIGHT_TMA, BLOCK_ROWS, BLOCK_Q)
            next_rows = rows + BLOCK_ROWS
            slots = _slots_or_rows(order_ptr, next_rows, next_rows < end, GATHERED)
            left_tile = rounded_operand(left_tile, PRECISION)
            right_tile = rounded_operand(right_tile, PRECISION)
            acc = tl.dot(left_tile.T, right_tile, acc, input_precision=PRECISION)
        if OUT_TMA:
            out.store([expert, first_p, first_q], acc.to(out.dtype).reshape(1, BLOCK_P, BLOCK_Q))
        else:
            p = (first_p + tl.arange(0, BLOCK_P)).to(tl.int64)
            q = first_q + tl.arange(0, BLOCK_Q)
            pointers = out + expert.to(tl.int64) * p_size * q_size + p[:, None] * q_size + q[None, :]
            mask = (p < p_size)[:, None] & (q < q_size)[None, :]
            tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def grouped_sum_kernel(
    grad_ptr,
    scale_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    num_columns,
    stride_grad,
    DIVISOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[e] = sum of grad[row] (* scale[slot] unless scale_ptr is None) over the expert's rows. fp32 or fp64."""
    ACC: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    GATHERED: tl.constexpr = DIVISOR > 0
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_range = columns < num_columns
    start, end = _expert_rows(offsets_ptr, expert)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for first in range(start, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        valid = rows < end
        slots = _slots_or_rows(order_ptr, rows, valid, GATHERED)
        pointers = grad_ptr + _operand_rows(rows, slots, DIVISOR)[:, None] * stride_grad + columns[None, :]
        grad = tl.load(pointers, mask=valid[:, None] & in_range[None, :], other=0.0).to(ACC)
        if scale_ptr is not None:
            grad *= tl.load(scale_ptr + slots, mask=valid, other=0.0).to(ACC)[:, None]
        acc += grad
    out_ptrs = out_ptr + expert.to(tl.int64) * num_columns + columns
    tl.store(out_ptrs, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=in_range)
