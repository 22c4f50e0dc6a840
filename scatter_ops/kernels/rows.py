"""Row movement between tokens, slots and grouped rows: dispatch, expand, combine and its backward.

One program handles one row and loops over its columns; sums are kept in fp32 (fp64 for fp64) and rounded once.
`inverse[slot]` is the slot's grouped row, or -1 - row for a sentinel.
"""

import triton
import triton.language as tl


@triton.jit
def _slot_row(inverse_ptr, slot, GROUPED: tl.constexpr):
    """Row of a slot and whether an expert takes it; rows in slot order are defined for every slot."""
    row = slot
    routed = slot >= 0
    if GROUPED:
        entry = tl.load(inverse_ptr + slot)
        routed = entry >= 0
        row = tl.where(routed, entry, -1 - entry).to(tl.int64)
    return row, routed


@triton.jit
def _weighted_row(
    y_ptr, topk_weights_ptr, inverse_ptr, slot, columns, in_range, stride_y, ACC: tl.constexpr, GROUPED: tl.constexpr
):
    row, routed = _slot_row(inverse_ptr, slot, GROUPED)
    y = tl.load(y_ptr + row * stride_y + columns, mask=in_range & routed, other=0.0).to(ACC)
    if topk_weights_ptr is not None:
        # A sentinel's weight may be anything, even NaN: it isn't read.
        y *= tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(ACC)
    return y


@triton.jit
def dispatch_kernel(
    x_ptr,
    out_ptr,
    inverse_ptr,
    num_columns,
    stride_x,
    TOP_K: tl.constexpr,
    ZERO_UNROUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[grouped row of slot] = x[slot // TOP_K]. One program a token: its row is read once.

    Rows of sentinels are zero if ZERO_UNROUTED, and not written otherwise.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < num_columns
    values = tl.load(x_ptr + token * stride_x + columns, mask=in_range, other=0.0)
    for k in range(TOP_K):
        row, routed = _slot_row(inverse_ptr, token * TOP_K + k, True)
        row_of_x = tl.where(routed, values, 0.0).to(values.dtype)
        tl.store(out_ptr + row * num_columns + columns, row_of_x, mask=in_range & (routed | ZERO_UNROUTED))


@triton.jit
def expand_kernel(
    parameter,
    out_ptr,
    offsets_ptr,
    num_columns,
    stride_e,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row] = parameter[expert of row], zero from offsets[-1] on."""
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BINS)
    ends = tl.load(offsets_ptr + experts, mask=experts < NUM_EXPERTS, other=2147483647)
    expert = tl.sum((ends <= row).to(tl.int32))
    routed = expert < NUM_EXPERTS
    if LIST:
        base = tl.load(parameter + expert, mask=routed, other=0).to(tl.pointer_type(out_ptr.dtype.element_ty))
    else:
        base = parameter + expert.to(tl.int64) * stride_e
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(base + columns, mask=routed & (columns < num_columns), other=0.0)
        tl.store(out_ptr + row * num_columns + columns, values, mask=columns < num_columns)


@triton.jit
def combine_kernel(
    y_ptr,
    topk_weights_ptr,
    inverse_ptr,
    out_ptr,
    num_columns,
    stride_y,
    TOP_K: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[token] = sum over k of topk_weights[token, k] (1 if the pointer is None) * y[row of slot]."""
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < num_columns
    acc = tl.zeros([BLOCK], ACC)
    # Unrolled, all of a token's rows are in flight at once.
    if TOP_K <= 16:
        for k in tl.static_range(TOP_K):
            slot = token * TOP_K + k
            acc += _weighted_row(y_ptr, topk_weights_ptr, inverse_ptr, slot, columns, in_range, stride_y, ACC, GROUPED)
    else:
        for k in range(TOP_K):
            slot = token * TOP_K + k
            acc += _weighted_row(y_ptr, topk_weights_ptr, inverse_ptr, slot, columns, in_range, stride_y, ACC, GROUPED)
    tl.store(out_ptr + token * num_columns + columns, acc.to(out_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def combine_backward_kernel(
    grad_out_ptr,
    y_ptr,
    topk_weights_ptr,
    inverse_ptr,
    grad_y_ptr,
    grad_weights_ptr,
    num_columns,
    stride_grad,
    stride_y,
    TOP_K: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a slot. Gradients whose pointer is None aren't computed."""
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    slot = tl.program_id(0).to(tl.int64)
    row, routed = _slot_row(inverse_ptr, slot, GROUPED)
    weight = tl.full([], 1.0, ACC)
    if topk_weights_ptr is not None:
        weight = tl.load(topk_weights_ptr + slot).to(ACC)
    dot = tl.zeros([BLOCK], ACC)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_range = columns < num_columns
        grad = tl.load(grad_out_ptr + slot // TOP_K * stride_grad + columns, mask=in_range, other=0.0).to(ACC)
        if grad_weights_ptr is not None:
            dot += grad * tl.load(y_ptr + row * stride_y + columns, mask=in_range & routed, other=0.0).to(ACC)
        if grad_y_ptr is not None:
            scaled = tl.where(routed, weight * grad, 0.0).to(grad_y_ptr.dtype.element_ty)
            tl.store(grad_y_ptr + row * num_columns + columns, scaled, mask=in_range)
    if grad_weights_ptr is not None:
        tl.store(grad_weights_ptr + slot, tl.sum(dot).to(grad_weights_ptr.dtype.element_ty))
