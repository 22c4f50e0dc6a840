"""First half of the expert MLP: gate-up GEMM over gathered rows, with bias and activation in its epilogue.

for each tile (expert e, rows of e, BLOCK_F columns of A):
    h = x[token of rows] @ [gate | up]^T (+ bias unless SCALE_INPUT), rounded; stored if STORE_H
    A[rows] = act(gate) * up of the rounded h     (of s * h + bias, in fp32, if SCALE_INPUT)
rows of h of sentinel slots = 0
"""

import triton
import triton.language as tl

from scatter_ops.kernels.activation import activate
from scatter_ops.kernels.glu import add_gate_up_bias, split_gate_up, store_gate_up
from scatter_ops.kernels.mainloop import (
    as_multiple,
    load_slots,
    load_tile,
    multiply_tile,
    source_rows,
    store_tile,
    weight_strides,
    zero_unrouted_rows,
)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def glu_forward_kernel(
    x,
    weight,
    gate_bias,
    up_bias,
    topk_weights_ptr,
    a,
    h,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    alpha,
    limit,
    num_slots,
    num_experts,
    f_size,
    h_size,
    k_size,
    stride_x,
    stride_e,
    stride_way,
    stride_n,
    stride_k,
    experts_per_way,
    stride_gate_bias,
    stride_up_bias,
    distances_ptr,
    X_DIVISOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALE_INPUT: tl.constexpr,
    STORE_H: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    X_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
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
    """a and h are pointers, or ragged descriptors if OUT_TMA; h_ptr is always h's memory.

    UNIT: see weight_strides.
    """
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    # An interleaved weight is read as it lies: one way of 2 F columns.
    N_WAYS: tl.constexpr = 2 if LAYOUT == "concatenated" else 1
    BLOCK_N: tl.constexpr = BLOCK_F if LAYOUT == "plain" else 2 * BLOCK_F
    COLUMN_STEP: tl.constexpr = 2 if LAYOUT == "interleaved" else 1
    SLOTS: tl.constexpr = SCALE_INPUT or X_DIVISOR > 0
    num_row_tiles = tl.load(tile_map_ptr)
    num_column_tiles = tl.cdiv(f_size, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    first_tile, step = tl.program_id(0), tl.num_programs(0)
    strides = weight_strides(stride_e, stride_way, stride_n, stride_k, N_MAJOR, UNIT)
    h_size, k_size, stride_x = as_multiple(h_size, UNIT), as_multiple(k_size, UNIT), as_multiple(stride_x, UNIT)
    n_size = as_multiple(f_size, UNIT) if N_WAYS == 2 else h_size
    here = load_tile(tile_map_ptr, first_tile, num_row_tiles, num_column_tiles, GROUP_M)
    slots = load_slots(order_ptr, here[1], here[2], BLOCK_M, SLOTS)
    for tile in tl.range(first_tile, num_tiles, step, flatten=FLATTEN):
        if FLATTEN:
            here = load_tile(tile_map_ptr, tile, num_row_tiles, num_column_tiles, GROUP_M)
            slots = load_slots(order_ptr, here[1], here[2], BLOCK_M, SLOTS)
        else:
            ahead = load_tile(tile_map_ptr, tile + step, num_row_tiles, num_column_tiles, GROUP_M)
        expert, first_row, end_row, column_tile = here
        rows = first_row + tl.arange(0, BLOCK_M)
        valid = rows < end_row
        first_f = column_tile * BLOCK_F
        left = (x, source_rows(rows, slots, valid, X_DIVISOR), first_row, stride_x)
        right = (weight, expert, first_f * COLUMN_STEP, n_size, strides, experts_per_way, distances_ptr)
        acc = multiply_tile(
            left, right, k_size, DTYPE, WEIGHT, X_TMA, N_MAJOR, N_WAYS, 1, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if not FLATTEN:
            slots_ahead = load_slots(order_ptr, ahead[1], ahead[2], BLOCK_M, SLOTS)
        gate, up = split_gate_up(acc, BLOCK_M, BLOCK_F, LAYOUT)
        bias = (expert, gate_bias, up_bias, stride_gate_bias, stride_up_bias)
        if not SCALE_INPUT:
            gate, up = add_gate_up_bias(gate, up, bias, first_f, f_size, DTYPE, GATE_BIAS, UP_BIAS, BLOCK_F, LAYOUT)
        gate = gate.to(DTYPE)
        up = up.to(DTYPE)
        row_index = rows.to(tl.int64)
        if STORE_H:
            place = (row_index, first_row, end_row, first_f, f_size)
            store_gate_up(h, gate, up, place, h_size, BLOCK_M, BLOCK_F, LAYOUT, OUT_TMA)
        gate = gate.to(tl.float32)
        up = up.to(tl.float32)
        if SCALE_INPUT:
            scale = tl.load(topk_weights_ptr + slots, mask=valid, other=0.0).to(tl.float32)[:, None]
            gate *= scale
            up *= scale
            gate, up = add_gate_up_bias(gate, up, bias, first_f, f_size, DTYPE, GATE_BIAS, UP_BIAS, BLOCK_F, LAYOUT)
        result = activate(gate, up, alpha, limit, ACTIVATION, LAYOUT != "plain")
        store_tile(a, result, row_index, first_row, end_row, first_f, f_size, f_size, OUT_TMA, BLOCK_F)
        if not FLATTEN:
            here = ahead
            slots = slots_ahead
    if STORE_H:
        zero_unrouted_rows(h_ptr, order_ptr, offsets_ptr, num_slots, h_size, h_size, num_experts, False)
