"""Second half of the expert MLP, backward: gradient of A by a GEMM, activation's derivative in its epilogue.

With s the router weight and dA' = grad_out[token of rows] @ W_down (before s), in fp32, and A recomputed from the
stored h:

    weights on the output: dS = <dA', A>     dA = s dA'     dH = dA * act'      sA = s A (operand of dW_down)
    weights on the input:  dS = <dP, h>      dP = dA' * act'(s h + b)   dH = s dP   sA = A        (P the pre-activation)

dS is written as partials [N, column tiles], one per tile; scatter_ops.kernels.partials sums them in a fixed order.
k_size = 0 skips the GEMM where only sA is wanted.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.activation import activate_backward
from scatter_ops.kernels.columns import split_columns
from scatter_ops.kernels.glu import add_gate_up_bias, load_gate_up, store_gate_up
from scatter_ops.kernels.mainloop import (
    as_multiple,
    load_slots,
    load_tile,
    multiply_tile,
    source_rows,
    store_tile,
    weight_strides,
)


@triton.jit
def _differentiate_tile(
    grad_a,
    gate_h,
    up_h,
    scale,
    bias,
    outputs,
    place,
    h_size,
    alpha,
    limit,
    DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    OUT_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Store a tile of each of outputs = (dH, dP, sA) that isn't None; return its part of dS, [BLOCK_M].

    bias and place are as in scatter_ops.kernels.glu.
    """
    GATED: tl.constexpr = LAYOUT != "plain"
    grad_h, grad_pre, scaled_a = outputs
    rows, first_row, end_row, first_f, f_size = place
    gate_h = gate_h.to(tl.float32)
    up_h = up_h.to(tl.float32)
    if SCALE_INPUT:
        gate = gate_h * scale
        up = up_h * scale
        gate, up = add_gate_up_bias(gate, up, bias, first_f, f_size, DTYPE, GATE_BIAS, UP_BIAS, BLOCK_F, LAYOUT)
        a, grad_gate, grad_up = activate_backward(gate, up, grad_a, alpha, limit, ACTIVATION, GATED)
        if GATED:
            grad_scale = tl.sum(grad_gate * gate_h + grad_up * up_h, 1)
        else:
            grad_scale = tl.sum(grad_gate * gate_h, 1)
        if grad_pre is not None:
            store_gate_up(grad_pre, grad_gate, grad_up, place, h_size, BLOCK_M, BLOCK_F, LAYOUT, OUT_TMA)
        grad_gate *= scale
        grad_up *= scale
    else:
        a, grad_gate, grad_up = activate_backward(gate_h, up_h, grad_a * scale, alpha, limit, ACTIVATION, GATED)
        grad_scale = tl.sum(grad_a * a, 1)
        a *= scale
    if scaled_a is not None:
        store_tile(scaled_a, a, rows, first_row, end_row, first_f, f_size, f_size, OUT_TMA, BLOCK_F)
    if grad_h is not None:
        store_gate_up(grad_h, grad_gate, grad_up, place, h_size, BLOCK_M, BLOCK_F, LAYOUT, OUT_TMA)
    return grad_scale


@triton.jit
def glu_backward_kernel(
    grad_out,
    weight,
    h_ptr,
    gate_bias,
    up_bias,
    topk_weights_ptr,
    grad_h,
    grad_pre,
    scaled_a,
    partials_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    alpha,
    limit,
    f_size,
    h_size,
    k_size,
    num_partials,
    stride_grad,
    stride_e,
    stride_way,
    stride_n,
    stride_k,
    experts_per_way,
    stride_gate_bias,
    stride_up_bias,
    distances_ptr,
    GRAD_DIVISOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    X_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    N_MAJOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Outputs that are None aren't written. h and grad_h may be the same memory.

    The epilogue takes the tile in SPLIT parts, one after the other, for want of registers: BLOCK_F / SPLIT columns
    each. The outputs are pointers, or ragged descriptors of such parts if OUT_TMA. UNIT: see weight_strides.
    """
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    PART: tl.constexpr = BLOCK_F // SPLIT
    num_row_tiles = tl.load(tile_map_ptr)
    num_column_tiles = tl.cdiv(f_size, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    strides = weight_strides(stride_e, stride_way, stride_n, stride_k, N_MAJOR, UNIT)
    stride_grad, k_size = as_multiple(stride_grad, UNIT), as_multiple(k_size, UNIT)
    f_size, h_size = as_multiple(f_size, UNIT), as_multiple(h_size, UNIT)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        expert, first_row, end_row, column_tile = load_tile(
            tile_map_ptr, tile, num_row_tiles, num_column_tiles, GROUP_M
        )
        rows = first_row + tl.arange(0, BLOCK_M)
        valid = rows < end_row
        first_f = column_tile * BLOCK_F
        row_index = rows.to(tl.int64)
        slots = load_slots(order_ptr, first_row, end_row, BLOCK_M, True)
        scale = tl.load(topk_weights_ptr + slots, mask=valid, other=0.0).to(tl.float32)[:, None]
        left = (grad_out, source_rows(rows, slots, valid, GRAD_DIVISOR), first_row, stride_grad)
        right = (weight, expert, first_f, f_size, strides, experts_per_way, distances_ptr)
        grad_a = multiply_tile(
            left, right, k_size, DTYPE, WEIGHT, X_TMA, N_MAJOR, 1, 1, EVEN_K, BLOCK_M, BLOCK_F, BLOCK_K, PRECISION
        )
        bias = (expert, gate_bias, up_bias, stride_gate_bias, stride_up_bias)
        grad_scale = tl.zeros([BLOCK_M], tl.float32)
        parts = split_columns(grad_a, SPLIT)
        gate_h, up_h = load_gate_up(h_ptr, row_index, valid, h_size, first_f, f_size, BLOCK_M, PART, LAYOUT)
        for part in tl.static_range(SPLIT):
            gate_now = gate_h
            up_now = up_h
            if part + 1 < SPLIT:
                # The next part's loads are under way while this part is worked on.
                next_f = first_f + (part + 1) * PART
                gate_h, up_h = load_gate_up(h_ptr, row_index, valid, h_size, next_f, f_size, BLOCK_M, PART, LAYOUT)
            grad_scale += _differentiate_tile(
                parts[part],
                gate_now,
                up_now,
                scale,
                bias,
                (grad_h, grad_pre, scaled_a),
                (row_index, first_row, end_row, first_f + part * PART, f_size),
                h_size,
                alpha,
                limit,
                DTYPE,
                ACTIVATION,
                LAYOUT,
                SCALE_INPUT,
                GATE_BIAS,
                UP_BIAS,
                OUT_TMA,
                BLOCK_M,
                PART,
            )
        if partials_ptr is not None:
            tl.store(partials_ptr + slots.to(tl.int64) * num_partials + column_tile, grad_scale, mask=valid)
