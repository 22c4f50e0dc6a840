"""scatter_ops.kernels.glu_forward on Hopper: a tile's activation runs on warps of its own, beside the next product.

    product warps       ring of stages -> accumulator -> h, rounded, in shared memory
    activation warps    that h -> h and A in memory, while the product warps are at the next tile

h is rounded before the activation in any case, so shared memory holds all that the activation needs. A tile of the
weight comes in two boxes, which may lie anywhere: gate and up where they are apart, else neighbours. Without biases,
router weights on the output. LAYOUT is that of glu.py. See hopper.py. Legend: N slots, E experts.
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
    make_barriers,
    multiply_step,
    quarters,
    stage_before,
    store_part,
    thread_barrier,
    zero_unrouted_rows,
)
from scatter_ops.kernels.mainloop import load_tile

BOX = gl.constexpr(128)  # columns of a box of the weight, half a tile
H_PART = gl.constexpr(64)  # columns of h in a tile of shared memory, of which there are four
ACTIVATION_WARPS = gl.constexpr(4)
ACTIVATION_REGISTERS = gl.constexpr(96)
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COLUMNS = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _gate_and_up(h_tiles, part: gl.constexpr, LAYOUT: gl.constexpr):
    """A part's gate and up in fp32; up is gate if plain."""
    gate = h_tiles.index(part).load(ROWS)
    up = gate
    if LAYOUT == "concatenated":
        up = h_tiles.index(2 + part).load(ROWS)
    elif LAYOUT == "interleaved":
        gate, up = gl.split(gate.reshape([BLOCK_M, H_PART // 2, 2]))
    return gate.to(gl.float32), up.to(gl.float32)


@gluon.jit
def _store_h(h, h_tiles, first_row, end_row, column_tile, part: gl.constexpr, LAYOUT: gl.constexpr):
    """Store the tiles of h that a part of the activation reads."""
    ragged_row = BOUND - (end_row - first_row)
    if LAYOUT == "concatenated":
        column = column_tile * BOX + part * H_PART
        store_part(h, h_tiles.index(part), [BOUND, end_row, ragged_row, 0, column])
        store_part(h, h_tiles.index(2 + part), [BOUND, end_row, ragged_row, 1, column])
    else:
        store_part(h, h_tiles.index(part), [BOUND, end_row, ragged_row, column_tile * BLOCK_N + part * H_PART])


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
    h_size,
    alpha,
    limit,
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
    STORE_H: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """What the activation's warps do."""
    BLOCK_F: gl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2  # columns of A in a tile
    PARTS: gl.constexpr = 2 if LAYOUT == "concatenated" else 4
    H_STORES: gl.constexpr = 0 if not STORE_H else 4 // PARTS
    num_row_tiles = gl.load(tile_map_ptr)
    num_column_tiles = gl.cdiv(f_size, BLOCK_F)
    num_tiles = num_row_tiles * num_column_tiles
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _, first_row, end_row, column_tile = load_tile(tile_map_ptr, tile, num_row_tiles, num_column_tiles, GROUP_M)
        mbarrier.wait(filled, phase)
        for part in gl.static_range(PARTS):
            if STORE_H:
                _store_h(h, h_tiles, first_row, end_row, column_tile, part, LAYOUT)
            gate, up = _gate_and_up(h_tiles, part, LAYOUT)
            result = activate(gate, up, alpha, limit, ACTIVATION, LAYOUT != "plain").to(a.dtype)
            tma.store_wait(H_STORES)  # A's last part has left
            a_tile.reshape([BLOCK_M, BLOCK_F // PARTS]).store(result)
            fence_async_shared()
            column = column_tile * BLOCK_F + part * (BLOCK_F // PARTS)
            store_part(a, a_tile, [BOUND, end_row, BOUND - (end_row - first_row), column])
        tma.store_wait(0)
        thread_barrier()
        mbarrier.arrive(emptied, count=1)
        phase ^= 1
    if STORE_H:
        zero_unrouted_rows(h_ptr, offsets_ptr, num_slots, h_size, num_experts, COLUMNS)


@gluon.jit
def _load_boxes(
    weight,
    w_tile,
    barrier,
    first_expert,
    second_expert,
    column_tile,
    k,
    pred,
    APART: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
):
    """A tile of the weight: BOX columns of gate and of up, or twice as many of one weight."""
    boxes = w_tile._reinterpret(weight.dtype, [2] + weight.block_type.shape, weight.layout)
    for second in gl.static_range(2):
        if LAYOUT == "concatenated":
            way = second if not APART else 0
            column = column_tile * BOX
        else:
            way = 0
            column = column_tile * BLOCK_N + second * BOX
        expert = second_expert if second else first_expert
        if N_MAJOR:
            tma.async_copy_global_to_shared(weight, [expert, k, way, column], barrier, boxes.index(second), pred)
        else:
            tma.async_copy_global_to_shared(weight, [expert, way, column, k], barrier, boxes.index(second), pred)


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
    first_expert,
    second_expert,
    column_tile,
    k,
    stride_x,
    pred,
    GATHER: gl.constexpr,
    APART: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
):
    """Fill a stage. If GATHER, x's rows are copied one by one, of which `ready` knows nothing."""
    barrier = ready.index(stage)
    X_BYTES: gl.constexpr = 0 if GATHER else BLOCK_M * BLOCK_K * 2
    if GATHER:
        columns = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, GATHERED))
        pointers = x + sources[:, None] * stride_x + columns[None, :]
        async_copy.async_copy_global_to_shared(x_tiles.index(stage), pointers)
        async_copy.commit_group()
    mbarrier.expect(barrier, X_BYTES + BLOCK_N * BLOCK_K * 2, pred)
    if not GATHER:
        tma.async_copy_global_to_shared(x, [first_row, k], barrier, x_tiles.index(stage), pred)
    w_tile = w_tiles.index(stage)
    _load_boxes(weight, w_tile, barrier, first_expert, second_expert, column_tile, k, pred, APART, LAYOUT, N_MAJOR)


@gluon.jit
def _expert_coordinates(distances_ptr, expert, experts_per_way, APART: gl.constexpr):
    """The expert's coordinates in the weight's descriptor, of the first and of the second box."""
    second = expert
    if APART:
        second = expert_coordinate(distances_ptr, expert + experts_per_way)
    return expert_coordinate(distances_ptr, expert), second


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
    experts_per_way,
    f_size,
    k_size,
    stride_x,
    X_DIVISOR: gl.constexpr,
    APART: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """What the product's warps do. A step is prefetched STAGES - 1 steps ahead, also beyond a tile's end."""
    GATHER: gl.constexpr = X_DIVISOR > 0
    num_row_tiles = gl.load(tile_map_ptr)
    num_column_tiles = gl.cdiv(f_size, BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2)
    num_tiles = num_row_tiles * num_column_tiles
    k_tiles = gl.cdiv(k_size, BLOCK_K)
    first_tile, hop = gl.program_id(0), gl.num_programs(0)
    expert, first_row, end_row, column_tile = load_tile(
        tile_map_ptr, first_tile, num_row_tiles, num_column_tiles, GROUP_M
    )
    experts = _expert_coordinates(distances_ptr, expert, experts_per_way, APART)
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
            experts[0],
            experts[1],
            column_tile,
            early * BLOCK_K,
            stride_x,
            first_tile < num_tiles,
            GATHER,
            APART,
            LAYOUT,
            N_MAJOR,
        )
    stage, phase, tile_phase = 0, 0, 1
    for tile in range(first_tile, num_tiles, hop):
        next_expert, next_row, next_end, next_column = load_tile(
            tile_map_ptr, tile + hop, num_row_tiles, num_column_tiles, GROUP_M
        )
        next_sources = _sources(order_ptr, next_row, next_end, max(1, X_DIVISOR))
        next_experts = _expert_coordinates(distances_ptr, next_expert, experts_per_way, APART)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        for step in range(k_tiles - STAGES + 1):
            if GATHER:
                async_copy.wait_group(STAGES - 2)
            acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, N_MAJOR)
            _load_step(
                x,
                weight,
                sources,
                x_tiles,
                w_tiles,
                ready,
                stage_before(stage, STAGES),
                first_row,
                experts[0],
                experts[1],
                column_tile,
                (step + STAGES - 1) * BLOCK_K,
                stride_x,
                True,
                GATHER,
                APART,
                LAYOUT,
                N_MAJOR,
            )
            stage, phase = advance(stage, phase, STAGES)
        for early in gl.static_range(STAGES - 1):
            if GATHER:
                async_copy.wait_group(STAGES - 2)
            acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, N_MAJOR)
            _load_step(
                x,
                weight,
                next_sources,
                x_tiles,
                w_tiles,
                ready,
                stage_before(stage, STAGES),
                next_row,
                next_experts[0],
                next_experts[1],
                next_column,
                early * BLOCK_K,
                stride_x,
                tile + hop < num_tiles,
                GATHER,
                APART,
                LAYOUT,
                N_MAJOR,
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
        sources, experts, first_row, column_tile = next_sources, next_experts, next_row, next_column
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
    experts_per_way,
    alpha,
    limit,
    num_slots,
    num_experts,
    f_size,
    h_size,
    k_size,
    stride_x,
    X_DIVISOR: gl.constexpr,
    ACTIVATION: gl.constexpr,
    APART: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STORE_H: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """x is a pointer if X_DIVISOR > 0, else a descriptor; weight's boxes have BOX columns; a and h are ragged ones.

    APART: gate and up are in tensors of their own, up's expert `experts_per_way` after gate's in distances_ptr.
    """
    DTYPE: gl.constexpr = a.dtype
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    W_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if N_MAJOR else [BLOCK_N, BLOCK_K]
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    w_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + W_SHAPE, SWIZZLED)
    h_tiles = gl.allocate_shared_memory(DTYPE, [4, BLOCK_M, H_PART], SWIZZLED)
    a_tile = gl.allocate_shared_memory(DTYPE, a.block_type.shape, a.layout)
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
                    experts_per_way,
                    f_size,
                    k_size,
                    stride_x,
                    X_DIVISOR,
                    APART,
                    LAYOUT,
                    N_MAJOR,
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
                    h_size,
                    alpha,
                    limit,
                    ACTIVATION,
                    LAYOUT,
                    STORE_H,
                    GROUP_M,
                ),
            ),
        ],
        [ACTIVATION_WARPS],
        [ACTIVATION_REGISTERS],
    )
