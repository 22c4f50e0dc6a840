"""Gate and up of a tile: split out of a product, loaded from h, stored to h, and their biases.

LAYOUT is the column order of h: "plain" (gate only), "concatenated" (all gate columns, then all up columns; a tile of the product
likewise) or "interleaved" (gate_0, up_0, gate_1, up_1, ...). The separate layout is stored as concatenated.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.mainloop import expert_base


@triton.jit
def split_gate_up(tile, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, LAYOUT: tl.constexpr):
    if LAYOUT == "plain":
        return tile, tile
    if LAYOUT == "interleaved":
        return tl.split(tile.reshape(BLOCK_M, BLOCK_F, 2))
    return tl.split(tile.reshape(BLOCK_M, 2, BLOCK_F).permute(0, 2, 1))


@triton.jit
def load_gate_up(
    h_ptr, rows, valid, stride_h, first_f, f_size, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, LAYOUT: tl.constexpr
):
    """Gate and up in fp32; up is gate if plain."""
    row_ptrs = h_ptr + rows[:, None] * stride_h
    if LAYOUT == "interleaved":
        columns = 2 * first_f + tl.arange(0, 2 * BLOCK_F)
        h = tl.load(row_ptrs + columns[None, :], mask=valid[:, None] & (columns < 2 * f_size)[None, :], other=0.0)
        gate, up = split_gate_up(h, BLOCK_M, BLOCK_F, LAYOUT)
        return gate.to(tl.float32), up.to(tl.float32)
    f = first_f + tl.arange(0, BLOCK_F)
    mask = valid[:, None] & (f < f_size)[None, :]
    gate = tl.load(row_ptrs + f[None, :], mask=mask, other=0.0).to(tl.float32)
    if LAYOUT == "plain":
        return gate, gate
    return gate, tl.load(row_ptrs + (f_size + f)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_gate_up(
    h_ptr,
    gate,
    up,
    rows,
    valid,
    stride_h,
    first_f,
    f_size,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    row_ptrs = h_ptr + rows[:, None] * stride_h
    if LAYOUT == "interleaved":
        columns = 2 * first_f + tl.arange(0, 2 * BLOCK_F)
        h = tl.join(gate.to(DTYPE), up.to(DTYPE)).reshape(BLOCK_M, 2 * BLOCK_F)
        tl.store(row_ptrs + columns[None, :], h, mask=valid[:, None] & (columns < 2 * f_size)[None, :])
    else:
        f = first_f + tl.arange(0, BLOCK_F)
        mask = valid[:, None] & (f < f_size)[None, :]
        tl.store(row_ptrs + f[None, :], gate.to(DTYPE), mask=mask)
        if LAYOUT != "plain":
            tl.store(row_ptrs + (f_size + f)[None, :], up.to(DTYPE), mask=mask)


@triton.jit
def add_gate_up_bias(
    gate,
    up,
    gate_bias,
    up_bias,
    expert,
    first_f,
    f_size,
    stride_gate_bias,
    stride_up_bias,
    DTYPE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """gate_bias holds both halves unless up_bias is given."""
    if BIAS == "none":
        return gate, up
    f = first_f + tl.arange(0, BLOCK_F)
    valid = f < f_size
    gate_base = expert_base(gate_bias, expert, stride_gate_bias, DTYPE, BIAS == "list")
    step: tl.constexpr = 2 if LAYOUT == "interleaved" else 1
    gate += tl.load(gate_base + step * f, mask=valid, other=0.0).to(tl.float32)[None, :]
    if LAYOUT == "plain":
        return gate, up
    if up_bias is not None:
        up_ptrs = expert_base(up_bias, expert, stride_up_bias, DTYPE, BIAS == "list") + f
    elif LAYOUT == "interleaved":
        up_ptrs = gate_base + 2 * f + 1
    else:
        up_ptrs = gate_base + f_size + f
    up += tl.load(up_ptrs, mask=valid, other=0.0).to(tl.float32)[None, :]
    return gate, up
