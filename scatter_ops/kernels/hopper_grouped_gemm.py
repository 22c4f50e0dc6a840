"""scatter_ops.kernels.grouped_gemm on Hopper, to grouped rows without bias: stores run beside the next tile's product.

A finished tile waits in shared memory and leaves in quarters during the steps of the next one: all programs finish a
tile at about the same time, and stores of all of them at once would keep loads waiting. See hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from scatter_ops.kernels.columns import split_columns
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BOX,
    QUARTER,
    SWIZZLED,
    Product,
    Tiles,
    first_operands,
    make_stages,
    multiply_and_load,
    num_tiles,
    operands_at,
    place_of,
    store_part,
    zero_unrouted_rows,
)


@gluon.jit
def _store_quarter(out, out_tiles, finished, NUMBER: gl.constexpr):
    """finished: first row, end of the expert's rows and column tile; nothing is stored where there are no rows."""
    first_row, end_row, column_tile = finished
    store_part(out, out_tiles.index(NUMBER), first_row, end_row, column_tile * BLOCK_N + NUMBER * QUARTER)


@gluon.jit(do_not_specialize=["num_slots", "num_experts"])
def grouped_gemm_kernel(
    x,
    weight,
    out,
    out_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    distances_ptr,
    experts_per_way,
    num_slots,
    num_experts,
    n_size,
    k_size,
    stride_x,
    x_size,
    X_DIVISOR: gl.constexpr,
    K_WAYS: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """out is a ragged descriptor of quarters of tiles; x, its numbers and experts_per_way are those of glu_forward."""
    x_tiles, w_tiles, ready = make_stages(weight, N_MAJOR, STAGES)
    second_way: gl.constexpr = 1 if K_WAYS == 2 and experts_per_way is None else 0
    way_size = k_size if K_WAYS == 2 else None
    product = Product(x, stride_x, x_size, weight, x_tiles, w_tiles, ready, second_way, BOX, way_size)
    out_tiles = gl.allocate_shared_memory(out.dtype, [4, BLOCK_M, QUARTER], SWIZZLED)
    num_rows, num_columns = gl.load(tile_map_ptr), gl.cdiv(n_size, BLOCK_N)
    tiles = Tiles(tile_map_ptr, order_ptr, distances_ptr, experts_per_way, num_rows, num_columns, X_DIVISOR, GROUP_M)
    steps = K_WAYS * gl.cdiv(k_size, BLOCK_K) - (STAGES - 1)
    first, hop = gl.program_id(0), gl.num_programs(0)
    here = first_operands(product, tiles)
    finished = 0, 0, 0  # not a tile past the last: TMA refuses columns far from the tensor
    stage, phase = 0, 0
    for number in range(first, num_tiles(tiles), hop):
        place_ahead = place_of(tiles, number + hop)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        for part in gl.static_range(4):
            for step in range(steps * part // 4, steps * (part + 1) // 4):
                acc, stage, phase = multiply_and_load(product, here, step + STAGES - 1, stage, phase, acc, True)
            _store_quarter(out, out_tiles, finished, part)
        ahead = operands_at(tiles, place_ahead)
        for early in gl.static_range(STAGES - 1):
            exists = number + hop < num_tiles(tiles)
            acc, stage, phase = multiply_and_load(product, ahead, early, stage, phase, acc, exists)
        quarters = split_columns(warpgroup_mma_wait(0, deps=(acc,)), 4)
        tma.store_wait(0)
        for part in gl.static_range(4):
            out_tiles.index(part).store(quarters[part].to(out.dtype))
        fence_async_shared()
        finished = here.first_row, here.end_row, here.column_tile
        here = ahead
    for part in gl.static_range(4):
        _store_quarter(out, out_tiles, finished, part)
    tma.store_wait(0)
    if X_DIVISOR is not None:
        async_copy.wait_group(0)
    zero_unrouted_rows(out_ptr, offsets_ptr, num_slots, n_size, num_experts)
