"""The router weight's gradient from its partials [N, parts]: summed in a fixed order, which atomics would not give.

glu_backward_kernel writes one part for each column tile; where the router weight multiplies a bias too, one more is
written here.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.mainloop import load_bias, load_tile


@triton.jit
def bias_partials_kernel(
    grad_out_ptr,
    bias,
    partials_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    d_size,
    stride_grad,
    stride_bias,
    num_partials,
    column,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partials[slot, column] = <grad_out[token], down_bias[expert]>: where s multiplies the bias too."""
    DTYPE: tl.constexpr = grad_out_ptr.dtype.element_ty
    num_row_tiles = tl.load(tile_map_ptr)
    if tl.program_id(0) < num_row_tiles:
        expert, first_row, end_row, _ = load_tile(tile_map_ptr, tl.program_id(0), num_row_tiles, 1, 1)
        rows = first_row + tl.arange(0, BLOCK_M)
        valid = rows < end_row
        slots = tl.load(order_ptr + rows, mask=valid, other=0).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, d_size, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            grad_ptrs = grad_out_ptr + (slots // TOP_K)[:, None] * stride_grad + d[None, :]
            grad = tl.load(grad_ptrs, mask=valid[:, None] & (d < d_size)[None, :], other=0.0).to(tl.float32)
            acc += grad * load_bias(bias, expert, d, d < d_size, stride_bias, DTYPE, BIAS == "list")[None, :]
        tl.store(partials_ptr + slots * num_partials + column, tl.sum(acc, 1), mask=valid)


@triton.jit(do_not_specialize=["num_slots"])
def sum_partials_kernel(
    partials_ptr, inverse_ptr, out_ptr, num_slots, num_partials, BLOCK: tl.constexpr, PARTIALS: tl.constexpr
):
    """out[slot] = sum over its partials in a fixed order; 0 for a sentinel."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PARTIALS)
    routed = tl.load(inverse_ptr + slots, mask=slots < num_slots, other=-1) >= 0
    pointers = partials_ptr + slots.to(tl.int64)[:, None] * num_partials + column[None, :]
    partials = tl.load(pointers, mask=routed[:, None] & (column < num_partials)[None, :], other=0.0)
    tl.store(out_ptr + slots, tl.sum(partials, 1).to(out_ptr.dtype.element_ty), mask=slots < num_slots)
