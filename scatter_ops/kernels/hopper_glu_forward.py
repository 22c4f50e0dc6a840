"""scatter_ops.kernels.glu_forward on Hopper: a tile's activation runs on warps of its own, beside the next product.

    product warps       ring of stages -> accumulator -> h, rounded, in shared memory
    activation warps    that h -> h and A in memory, while the product warps are at the next tile

h is rounded before the activation in any case, so shared memory holds all that the activation needs. For gate and up
side by side, without biases, router weights on the output. See hopper.py. Legend: N slots, E experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from scatter_ops.kernels.activation import activate
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BOUND,
    advance,
    expert_coordinate,
    load_step,
    make_barriers,
    multiply_step,
    quarters,
    stage_before,
    store_part,
    thread_barrier,
    zero_unrouted_rows,
)
from scatter_ops.kernels.mainloop import load_tile

BLOCK_F = gl.constexpr(128)
HALF = gl.constexpr(64)  # columns of A that are worked on at a time
ACTIVATION_WARPS = gl.constexpr(4)
ACTIVATION_REGISTERS = gl.constexpr(96)
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COLUMNS = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _activate_tiles(
    a,
    h,
    h_ptr,
    h_tiles,
    a_tile,
    filled,
    emptied,
    offsets_ptr,
    tile_map_ptr,
    num_slots,
    num_experts,
    f_size,
    alpha,
    limit,
    ACTIVATION: gl.constexpr,
    STORE_H: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """What the activation's warps do: h_tiles holds four tiles of HALF columns, two of gate and two of up."""
    num_row_tiles = gl.load(tile_map_ptr)
    num_column_tiles = gl.cdiv(f_size, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, first_row, end_row, column_tile = load_tile(tile_map_ptr, tile, num_row_tiles, num_column_tiles, GROUP_M)
        ragged_row = BOUND - (end_row - first_row)
        mbarrier.wait(filled, phase)
        for half in gl.static_range(2):
            column = column_tile * BLOCK_F + half * HALF
            gate_tile = h_tiles.index(half)
            up_tile = h_tiles.index(2 + half)
            if STORE_H:
                store_part(h, gate_tile, [BOUND, end_row, ragged_row, 0, column])
                store_part(h, up_tile, [BOUND, end_row, ragged_row, 1, column])
            gate = gate_tile.load(ROWS).to(gl.float32)
            up = up_tile.load(ROWS).to(gl.float32)
            result = activate(gate, up, alpha, limit, ACTIVATION, True).to(a.dtype)
            tma.store_wait(2 if STORE_H else 0)  # A's last half has left
            a_tile.store(result)
            fence_async_shared()
            store_part(a, a_tile, [BOUND, end_row, ragged_row, column])
        tma.store_wait(0)
        thread_barrier()
        mbarrier.arrive(emptied, count=1)
        phase ^= 1
    if STORE_H:
        zero_unrouted_rows(h_ptr, offsets_ptr, num_slots, 2 * f_size, num_experts, COLUMNS)


@gluon.jit
def _load_step(
    x,
    weight,
    sources,
    x_tiles,
    w_tiles,
    ready,
    stage,
    first_row,
    expert,
    first_f,
    k,
    stride_x,
    pred,
    GATHER: gl.constexpr,
):
    """load_step; if GATHER, x's rows are copied one by one, of which `ready` knows nothing."""
    if GATHER:
        columns = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, GATHERED))
        pointers = x + sources[:, None] * stride_x + columns[None, :]
        async_copy.async_copy_global_to_shared(x_tiles.index(stage), pointers)
        async_copy.commit_group()
        mbarrier.expect(ready.index(stage), BLOCK_N * BLOCK_K * 2, pred)
        coordinates = [expert, 0, first_f, k]
        tma.async_copy_global_to_shared(weight, coordinates, ready.index(stage), w_tiles.index(stage), pred)
    else:
        load_step(x, weight, x_tiles, w_tiles, ready, stage, first_row, expert, first_f, k, pred, False)


@gluon.jit
def _sources(order_ptr, first_row, end_row, X_DIVISOR: gl.constexpr):
    """The row of x for each row of a tile; row 0 beyond the expert's end."""
    rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, GATHERED))
    slots = gl.load(order_ptr + rows, mask=rows < end_row, other=0)
    return (slots // X_DIVISOR).to(gl.int64)


@gluon.jit
def _multiply_tiles(
    x,
    weight,
    x_tiles,
    w_tiles,
    h_tiles,
    ready,
    filled,
    emptied,
    order_ptr,
    tile_map_ptr,
    distances_ptr,
    f_size,
    k_size,
    stride_x,
    X_DIVISOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """What the product's warps do. A step is prefetched STAGES - 1 steps ahead, also beyond a tile's end."""
    GATHER: gl.constexpr = X_DIVISOR > 0
    num_row_tiles = gl.load(tile_map_ptr)
    num_column_tiles = gl.cdiv(f_size, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    k_tiles = gl.cdiv(k_size, BLOCK_K)
    first_tile, hop = gl.program_id(0), gl.num_programs(0)
    expert, first_row, end_row, column_tile = load_tile(
        tile_map_ptr, first_tile, num_row_tiles, num_column_tiles, GROUP_M
    )
    expert = expert_coordinate(distances_ptr, expert)
    sources = _sources(order_ptr, first_row, end_row, max(1, X_DIVISOR))
    for early in gl.static_range(STAGES - 1):
        _load_step(
            x,
            weight,
            sources,
            x_tiles,
            w_tiles,
            ready,
            early,
            first_row,
            expert,
            column_tile * BLOCK_F,
            early * BLOCK_K,
            stride_x,
            first_tile < num_tiles,
            GATHER,
        )
    stage, phase, tile_phase = 0, 0, 1
    for tile in range(first_tile, num_tiles, hop):
        next_expert, next_row, next_end, next_column = load_tile(
            tile_map_ptr, tile + hop, num_row_tiles, num_column_tiles, GROUP_M
        )
        next_sources = _sources(order_ptr, next_row, next_end, max(1, X_DIVISOR))
        next_expert = expert_coordinate(distances_ptr, next_expert)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        for step in range(k_tiles - STAGES + 1):
            if GATHER:
                async_copy.wait_group(STAGES - 2)
            acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, False)
            _load_step(
                x,
                weight,
                sources,
                x_tiles,
                w_tiles,
                ready,
                stage_before(stage, STAGES),
                first_row,
                expert,
                column_tile * BLOCK_F,
                (step + STAGES - 1) * BLOCK_K,
                stride_x,
                True,
                GATHER,
            )
            stage, phase = advance(stage, phase, STAGES)
        for early in gl.static_range(STAGES - 1):
            if GATHER:
                async_copy.wait_group(STAGES - 2)
            acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, False)
            _load_step(
                x,
                weight,
                next_sources,
                x_tiles,
                w_tiles,
                ready,
                stage_before(stage, STAGES),
                next_row,
                next_expert,
                next_column * BLOCK_F,
                early * BLOCK_K,
                stride_x,
                tile + hop < num_tiles,
                GATHER,
            )
            stage, phase = advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.wait(emptied, tile_phase)
        parts = quarters(acc)
        for part in gl.static_range(4):
            h_tiles.index(part).store(parts[part].to(h_tiles.dtype))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(filled, count=1)
        tile_phase ^= 1
        sources, expert, first_row, column_tile = next_sources, next_expert, next_row, next_column
    if GATHER:
        async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["num_slots", "num_experts"])
def glu_forward_kernel(
    x,
    weight,
    a,
    h,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_map_ptr,
    distances_ptr,
    alpha,
    limit,
    num_slots,
    num_experts,
    f_size,
    k_size,
    stride_x,
    X_DIVISOR: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STORE_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """x is a pointer if X_DIVISOR > 0, else a descriptor; a and h are ragged ones of [BLOCK_M, HALF] elements a way."""
    DTYPE: gl.constexpr = a.dtype
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], X_LAYOUT)
    w_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + weight.block_type.shape, weight.layout)
    h_tiles = gl.allocate_shared_memory(DTYPE, [4, BLOCK_M, HALF], X_LAYOUT)
    a_tile = gl.allocate_shared_memory(DTYPE, [BLOCK_M, HALF], X_LAYOUT)
    ready = make_barriers(STAGES)
    handed = make_barriers(2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply_tiles,
                (
                    x,
                    weight,
                    x_tiles,
                    w_tiles,
                    h_tiles,
                    ready,
                    handed.index(0),
                    handed.index(1),
                    order_ptr,
                    tile_map_ptr,
                    distances_ptr,
                    f_size,
                    k_size,
                    stride_x,
                    X_DIVISOR,
                    STAGES,
                    GROUP_M,
                ),
            ),
            (
                _activate_tiles,
                (
                    a,
                    h,
                    h_ptr,
                    h_tiles,
                    a_tile,
                    handed.index(0),
                    handed.index(1),
                    offsets_ptr,
                    tile_map_ptr,
                    num_slots,
                    num_experts,
                    f_size,
                    alpha,
                    limit,
                    ACTIVATION,
                    STORE_H,
                    GROUP_M,
                ),
            ),
        ],
        [ACTIVATION_WARPS],
        [ACTIVATION_REGISTERS],
    )
