"""scatter_ops.kernels.glu_forward on Hopper: a tile's activation runs on warps of its own, beside the next product.

    product warps       ring of stages -> accumulator -> h, rounded, in shared memory
    activation warps    that h -> h and A in memory, while the product warps are at the next tile

h is rounded before the activation in any case, so shared memory holds all that the activation needs. Without biases,
router weights on the output. See hopper.py. Legend: N slots, E experts.
"""

from typing import Any, NamedTuple

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
from scatter_ops.kernels.columns import split_columns
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BOX,
    SWIZZLED,
    Product,
    Tiles,
    first_operands,
    load_gate_up,
    make_barriers,
    make_stages,
    multiply_and_load,
    num_tiles,
    operands_at,
    place_of,
    store_gate_up,
    store_part,
    thread_barrier,
    zero_unrouted_rows,
)

H_PART = gl.constexpr(64)  # columns of h in a tile of shared memory, of which there are four
ACTIVATION_WARPS = gl.constexpr(4)
ACTIVATION_REGISTERS = gl.constexpr(96)
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


class Handover(NamedTuple):
    """h of a tile in shared memory, and barriers: the product warps filled it, the activation warps emptied it."""

    h_tiles: Any
    filled: Any
    emptied: Any


@gluon.jit
def _activate_tiles(a, h, a_tile, handover, tiles, alpha, limit, ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr):
    """What the activation's warps do. h: None unless it is stored."""
    BLOCK_F: gl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2  # columns of A in a tile
    PARTS: gl.constexpr = 2 if LAYOUT == "concatenated" else 4
    H_STORES: gl.constexpr = 0 if h is None else 4 // PARTS
    phase = 0
    for number in range(gl.program_id(0), num_tiles(tiles), gl.num_programs(0)):
        _, first_row, end_row, column_tile = place_of(tiles, number)
        mbarrier.wait(handover.filled, phase)
        for part in gl.static_range(PARTS):
            first_f = column_tile * BLOCK_F + part * (BLOCK_F // PARTS)
            gate_tile = handover.h_tiles.index(part)
            up_tile = handover.h_tiles.index((part + 2) % 4)  # read if concatenated
            if h is not None:
                store_gate_up(h, gate_tile, up_tile, first_row, end_row, first_f, LAYOUT)
            gate, up = load_gate_up(gate_tile, up_tile, LAYOUT, ROWS)
            result = activate(gate, up, alpha, limit, ACTIVATION, LAYOUT != "plain").to(a.dtype)
            tma.store_wait(H_STORES)  # A's last part has left
            a_tile.reshape([BLOCK_M, BLOCK_F // PARTS]).store(result)
            fence_async_shared()
            store_part(a, a_tile, first_row, end_row, first_f)
        tma.store_wait(0)
        thread_barrier()
        mbarrier.arrive(handover.emptied, count=1)
        phase ^= 1


@gluon.jit
def _multiply_tiles(product, handover, tiles, k_size):
    """What the product's warps do. A step is prefetched STAGES - 1 steps ahead, also beyond a tile's end."""
    STAGES: gl.constexpr = product.x_tiles.shape[0]
    k_tiles = gl.cdiv(k_size, BLOCK_K)
    first, hop = gl.program_id(0), gl.num_programs(0)
    here = first_operands(product, tiles)
    stage, phase, tile_phase = 0, 0, 1
    for number in range(first, num_tiles(tiles), hop):
        place_ahead = place_of(tiles, number + hop)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        for step in range(k_tiles - STAGES + 1):
            acc, stage, phase = multiply_and_load(product, here, step + STAGES - 1, stage, phase, acc, True)
        here = operands_at(tiles, place_ahead)
        for early in gl.static_range(STAGES - 1):
            exists = number + hop < num_tiles(tiles)
            acc, stage, phase = multiply_and_load(product, here, early, stage, phase, acc, exists)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.wait(handover.emptied, tile_phase)
        parts = split_columns(acc, 4)
        for part in gl.static_range(4):
            handover.h_tiles.index(part).store(parts[part].to(handover.h_tiles.dtype))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(handover.filled, count=1)
        tile_phase ^= 1
    if product.stride_x is not None:
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
    experts_per_way,
    alpha,
    limit,
    num_slots,
    num_experts,
    f_size,
    h_size,
    k_size,
    stride_x,
    x_size,
    X_DIVISOR: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """x is a ragged descriptor if X_DIVISOR and stride_x are None, else a pointer; a and h are ragged descriptors too.

    stride_x and x_size are those of Product.
    h and experts_per_way (up's expert is that many after gate's in distances_ptr) may be None.
    """
    CONCATENATED: gl.constexpr = LAYOUT == "concatenated"
    BLOCK_F: gl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2
    x_tiles, w_tiles, ready = make_stages(weight, N_MAJOR, STAGES)
    second_way: gl.constexpr = 1 if CONCATENATED and experts_per_way is None else 0
    second_column: gl.constexpr = 0 if CONCATENATED else BOX
    product = Product(x, stride_x, x_size, weight, x_tiles, w_tiles, ready, second_way, second_column, None)
    h_tiles = gl.allocate_shared_memory(a.dtype, [4, BLOCK_M, H_PART], SWIZZLED)
    a_tile = gl.allocate_shared_memory(a.dtype, a.block_type.shape, a.layout)
    handed = make_barriers(2)
    num_rows, num_columns = gl.load(tile_map_ptr), gl.cdiv(f_size, BLOCK_F)
    tiles = Tiles(tile_map_ptr, order_ptr, distances_ptr, experts_per_way, num_rows, num_columns, X_DIVISOR, GROUP_M)
    handover = Handover(h_tiles, handed.index(0), handed.index(1))
    gl.warp_specialize(
        [
            (_multiply_tiles, (product, handover, tiles, k_size)),
            (_activate_tiles, (a, h, a_tile, handover, tiles, alpha, limit, ACTIVATION, LAYOUT)),
        ],
        [ACTIVATION_WARPS],
        [ACTIVATION_REGISTERS],
    )
    if h is not None:
        zero_unrouted_rows(h_ptr, offsets_ptr, num_slots, h_size, num_experts)
