"""Gradients of per-expert parameters: reductions over each expert's rows, in a fixed order.

    weight_grad[e] = left[rows of e]^T @ right[rows of e]          bias_grad[e] = sum of grad[rows of e]

Rows are read grouped or gathered by index; an expert without rows gets exact zeros.
"""

import triton
import triton.language as tl


@triton.jit
def _expert_rows(offsets_ptr, expert):
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(offsets_ptr + expert)


@triton.jit
def _slots_or_rows(order_ptr, rows, valid, GATHERED: tl.constexpr):
    if GATHERED:
        return tl.load(order_ptr + rows, mask=valid, other=0)
    return rows


@triton.jit
def _operand_rows(grouped_rows, slots, DIVISOR: tl.constexpr):
    if DIVISOR == 0:
        return grouped_rows.to(tl.int64)
    return (slots // DIVISOR).to(tl.int64)


@triton.jit
def weight_grad_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    p_size,
    q_size,
    stride_left,
    stride_right,
    NUM_EXPERTS: tl.constexpr,
    LEFT_DIVISOR: tl.constexpr,
    RIGHT_DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_P: tl.constexpr,
):
    """out [E, P, Q]. A divisor of 0 reads an operand's rows grouped, another reads row slot // divisor."""
    GATHERED: tl.constexpr = LEFT_DIVISOR + RIGHT_DIVISOR > 0
    p_tiles = tl.cdiv(p_size, BLOCK_P)
    q_tiles = tl.cdiv(q_size, BLOCK_Q)
    expert = tl.program_id(0) // (p_tiles * q_tiles)
    tile = tl.program_id(0) % (p_tiles * q_tiles)
    group = tile // (GROUP_P * q_tiles)
    p_in_group = tl.minimum(p_tiles - group * GROUP_P, GROUP_P)
    within = tile % (GROUP_P * q_tiles)
    p = (group * GROUP_P + within % p_in_group) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = within // p_in_group * BLOCK_Q + tl.arange(0, BLOCK_Q)
    p_valid = p < p_size
    q_valid = q < q_size

    start, end = _expert_rows(offsets_ptr, expert)
    block = tl.arange(0, BLOCK_ROWS)
    acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
    # Indices are loaded one iteration ahead: loaded where they are used, they would cost a stage of the pipeline.
    slots = _slots_or_rows(order_ptr, start + block, start + block < end, GATHERED)
    for first in range(start, end, BLOCK_ROWS):
        rows = first + block
        valid = rows < end
        next_rows = rows + BLOCK_ROWS
        left_rows = _operand_rows(rows, slots, LEFT_DIVISOR)
        right_rows = _operand_rows(rows, slots, RIGHT_DIVISOR)
        slots = _slots_or_rows(order_ptr, next_rows, next_rows < end, GATHERED)
        left_ptrs = left_ptr + left_rows[None, :] * stride_left + p[:, None]
        right_ptrs = right_ptr + right_rows[:, None] * stride_right + q[None, :]
        left = tl.load(left_ptrs, mask=p_valid[:, None] & valid[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=valid[:, None] & q_valid[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * p_size * q_size + p.to(tl.int64)[:, None] * q_size + q[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=p_valid[:, None] & q_valid[None, :])


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
