"""Grouped GEMM of ScatterMoE (arXiv 2403.08245): rows read scattered or grouped, rows written scattered or grouped.

for each tile (expert e, rows of e, columns):                     persistent programs, tiles from the tile map
    out[rows] = x[source of rows] @ weight[e]^T + bias[e]
rows of sentinel slots = 0
"""

import triton
import triton.language as tl

from scatter_ops.kernels.mainloop import (
    as_multiple,
    load_bias,
    load_slots,
    load_tile,
    multiply_tile,
    source_rows,
    store_tile,
    weight_strides,
    zero_unrouted_rows,
)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def grouped_gemm_kernel(
    x,
    weight,
    bias,
    out,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    num_slots,
    num_experts,
    n_size,
    k_size,
    stride_x,
    stride_e,
    stride_way,
    stride_n,
    stride_k,
    experts_per_way,
    stride_bias,
    stride_out,
    distances_ptr,
    X_DIVISOR: tl.constexpr,
    SCATTER: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    X_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    N_MAJOR: tl.constexpr,
    K_WAYS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """out is out_ptr, or a ragged descriptor of it if OUT_TMA (which SCATTER excludes). UNIT: see weight_strides."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SLOTS: tl.constexpr = SCATTER or X_DIVISOR > 0
    n_size, k_size, stride_x = as_multiple(n_size, UNIT), as_multiple(k_size, UNIT), as_multiple(stride_x, UNIT)
    num_row_tiles = tl.load(tile_map_ptr)
    num_column_tiles = tl.cdiv(n_size, BLOCK_N)
    num_tiles = num_row_tiles * num_column_tiles
    first_tile, step = tl.program_id(0), tl.num_programs(0)
    strides = weight_strides(stride_e, stride_way, stride_n, stride_k, N_MAJOR, UNIT)
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
        left = (x, source_rows(rows, slots, valid, X_DIVISOR), first_row, stride_x)
        first_column = column_tile * BLOCK_N
        right = (weight, expert, first_column, n_size, strides, experts_per_way, distances_ptr)
        acc = multiply_tile(
            left, right, k_size, DTYPE, WEIGHT, X_TMA, N_MAJOR, 1, K_WAYS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        if not FLATTEN:
            slots_ahead = load_slots(order_ptr, ahead[1], ahead[2], BLOCK_M, SLOTS)
        if BIAS != "none":
            columns = first_column + tl.arange(0, BLOCK_N)
            in_range = columns < n_size
            acc += load_bias(bias, expert, columns, in_range, stride_bias, DTYPE, BIAS == "list")[None, :]
        targets = source_rows(rows, slots, valid, 1 if SCATTER else 0)
        store_tile(out, acc, targets, first_row, end_row, first_column, n_size, stride_out, OUT_TMA, BLOCK_N)
        if not FLATTEN:
            here = ahead
            slots = slots_ahead
    zero_unrouted_rows(out_ptr, order_ptr, offsets_ptr, num_slots, n_size, stride_out, num_experts, SCATTER)
