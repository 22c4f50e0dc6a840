"""Gate and up of a tile: split out of a product, loaded from h, stored to h, and their biases.

LAYOUT is the column order of h: "plain" (gate only), "concatenated" (all gate columns, then all up columns; a tile of
the product likewise) or "interleaved" (gate_0, up_0, gate_1, up_1, ...). The separate layout is stored as
concatenated.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.mainloop import expert_base, store_tile
from scatter_ops.kernels.ragged import store_rows_of_way


@triton.jit
def split_gate_up(tile, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, LAYOUT: tl.constexpr):
    if LAYOUT == "plain":
        gate = tile
        up = tile
    elif LAYOUT == "interleaved":
        gate, up = tl.split(tile.reshape(BLOCK_M, BLOCK_F, 2))
    else:
        gate, up = tl.split(tile.reshape(BLOCK_M, 2, BLOCK_F).permute(0, 2, 1))
    return gate, up


@triton.jit
def load_gate_up(
    h_ptr, rows, valid, stride_h, first_f, f_size, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, LAYOUT: tl.constexpr
):
    """Gate and up; up is gate if plain."""
    row_ptrs = h_ptr + rows[:, None] * stride_h
    if LAYOUT == "interleaved":
        columns = 2 * first_f + tl.arange(0, 2 * BLOCK_F)
        h = tl.load(row_ptrs + columns[None, :], mask=valid[:, None] & (columns < 2 * f_size)[None, :], other=0.0)
        gate, up = split_gate_up(h, BLOCK_M, BLOCK_F, LAYOUT)
    else:
        f = first_f + tl.arange(0, BLOCK_F)
        mask = valid[:, None] & (f < f_size)[None, :]
        gate = tl.load(row_ptrs + f[None, :], mask=mask, other=0.0)
        up = gate
        if LAYOUT != "plain":
            up = tl.load(row_ptrs + (f_size + f)[None, :], mask=mask, other=0.0)
    return gate, up


@triton.jit
def store_gate_up(
    h,
    gate,
    up,
    place,
    stride_h,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LAYOUT: tl.constexpr,
    TMA: tl.constexpr,
):
    """place = (rows, first_row, end_row, first_f, f_size).

    h is a pointer, or a ragged descriptor ([rows, 2, F] if concatenated) if TMA.
    """
    rows, first_row, end_row, first_f, f_size = place
    if LAYOUT == "interleaved":
        tile = tl.join(gate, up).reshape(BLOCK_M, 2 * BLOCK_F)
        store_tile(h, tile, rows, first_row, end_row, 2 * first_f, 2 * f_size, stride_h, TMA, 2 * BLOCK_F)
    elif LAYOUT == "plain":
        store_tile(h, gate, rows, first_row, end_row, first_f, f_size, stride_h, TMA, BLOCK_F)
    elif TMA:
        store_rows_of_way(h, gate, first_row, end_row, 0, first_f)
        store_rows_of_way(h, up, first_row, end_row, 1, first_f)
    else:
        store_tile(h, gate, rows, first_row, end_row, first_f, f_size, stride_h, TMA, BLOCK_F)
        store_tile(h + f_size, up, rows, first_row, end_row, first_f, f_size, stride_h, TMA, BLOCK_F)


@triton.jit
def add_gate_up_bias(
    gate,
    up,
    bias,
    first_f,
    f_size,
    DTYPE: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """bias = (expert, gate's bias, up's, stride of an expert in either).

    GATE_BIAS: none, strided or list. UP_BIAS too, or "within": the up half of the tensor that gate's is.
    """
    expert, gate_bias, up_bias, stride_gate_bias, stride_up_bias = bias
    f = first_f + tl.arange(0, BLOCK_F)
    valid = f < f_size
    if GATE_BIAS != "none":
        STEP: tl.constexpr = 2 if LAYOUT == "interleaved" else 1
        gate_base = expert_base(gate_bias, expert, stride_gate_bias, DTYPE, GATE_BIAS == "list")
        gate += tl.load(gate_base + STEP * f, mask=valid, other=0.0).to(tl.float32)[None, :]
        if LAYOUT != "plain" and UP_BIAS == "within":
            up_columns = 2 * f + 1 if LAYOUT == "interleaved" else f_size + f
            up += tl.load(gate_base + up_columns, mask=valid, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS == "strided" or UP_BIAS == "list":
        up_base = expert_base(up_bias, expert, stride_up_bias, DTYPE, UP_BIAS == "list")
        up += tl.load(up_base + f, mask=valid, other=0.0).to(tl.float32)[None, :]
    return gate, up
