"""scatter_ops.kernels.glu_backward on Hopper, for router weights on the output: h, dH and A by TMA, see hopper.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from scatter_ops.kernels.activation import activate_backward
from scatter_ops.kernels.columns import split_columns
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BOX,
    Product,
    Tiles,
    advance,
    first_operands,
    load_gate_up,
    load_step,
    make_stages,
    multiply_step,
    num_tiles,
    operands_at,
    place_of,
    stage_before,
    store_gate_up,
    store_part,
)

PART = gl.constexpr(32)  # columns of A that are worked on at a time
PART_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 32, 16]))
# A part of an h that interleaves gate and up: each thread has the pairs of what it has of a part of the product.
PAIRS_LAYOUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [64, 0]],
        [],
        [128, 64],
    )
)


@gluon.jit
def _h_tiles(product, h, stage, LAYOUT: gl.constexpr):
    """A stage's room for 2 * PART columns of gate and up: 4 tiles (gate, up, gate, up), or 2 (gate alone if plain)."""
    TILES: gl.constexpr = 4 if LAYOUT == "concatenated" else 2
    return product.w_tiles.index(stage)._reinterpret(h.dtype, [TILES] + h.block_type.shape, h.layout)


@gluon.jit
def _load_h(product, h, stage, first_row, first_f, LAYOUT: gl.constexpr):
    h_tiles = _h_tiles(product, h, stage, LAYOUT)
    barrier = product.ready.index(stage)
    COLUMNS: gl.constexpr = PART if LAYOUT == "plain" else 2 * PART
    mbarrier.expect(barrier, 2 * BLOCK_M * COLUMNS * 2)
    for half in gl.static_range(2):
        if LAYOUT == "concatenated":
            for way in gl.static_range(2):
                tile = h_tiles.index(2 * half + way)
                tma.async_copy_global_to_shared(h, [first_row, way, first_f + half * PART], barrier, tile)
        else:
            column = first_f * (COLUMNS // PART) + half * COLUMNS
            tma.async_copy_global_to_shared(h, [first_row, column], barrier, h_tiles.index(half))
    if product.stride_x is not None:
        async_copy.commit_group()  # an empty one: multiply_step counts a group a position


@gluon.jit
def _differentiate_half(
    grad_a,
    scale,
    h_tiles,
    a_tiles,
    grad_h,
    scaled_a,
    first_row,
    end_row,
    first_f,
    alpha,
    limit,
    half: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Store PART columns of dH, in h's place, and of sA, each unless None; return their part of dS, [BLOCK_M]."""
    DTYPE: gl.constexpr = h_tiles.dtype
    CONCATENATED: gl.constexpr = LAYOUT == "concatenated"
    gate_tile = h_tiles.index(2 * half if CONCATENATED else half)
    up_tile = h_tiles.index(2 * half + 1 if CONCATENATED else half)
    if CONCATENATED:
        gate_tile = gate_tile.reshape([BLOCK_M, PART])
        up_tile = up_tile.reshape([BLOCK_M, PART])
    gate, up = load_gate_up(gate_tile, up_tile, LAYOUT, PAIRS_LAYOUT if LAYOUT == "interleaved" else PART_LAYOUT)
    gate = gl.convert_layout(gate, PART_LAYOUT, assert_trivial=True)
    up = gl.convert_layout(up, PART_LAYOUT, assert_trivial=True)
    a, grad_gate, grad_up = activate_backward(gate, up, grad_a * scale, alpha, limit, ACTIVATION, LAYOUT != "plain")
    if grad_h is not None:
        if LAYOUT == "interleaved":
            gate_tile.store(gl.join(grad_gate, grad_up).reshape([BLOCK_M, 2 * PART]).to(DTYPE))
        else:
            gate_tile.store(grad_gate.to(DTYPE))
        if CONCATENATED:
            up_tile.store(grad_up.to(DTYPE))
    if scaled_a is not None:
        a_tile = a_tiles._reinterpret(DTYPE, [2] + scaled_a.block_type.shape, scaled_a.layout).index(half)
        a_tile.reshape([BLOCK_M, PART]).store((a * scale).to(DTYPE))
    fence_async_shared()
    if grad_h is not None:
        store_gate_up(grad_h, gate_tile, up_tile, first_row, end_row, first_f, LAYOUT)
    if scaled_a is not None:
        store_part(scaled_a, a_tile, first_row, end_row, first_f)
    return gl.sum(grad_a * a, 1)


@gluon.jit
def _multiply_tile(product, h, tile, stage, phase, k_size, LAYOUT: gl.constexpr):
    """The product, with the first parts of h under way behind its steps; stage and phase after it."""
    STAGES: gl.constexpr = product.x_tiles.shape[0]
    k_tiles = gl.cdiv(k_size, BLOCK_K)
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
    # No branch between products: one would make the compiler wait for each of them.
    acc = multiply_step(product, stage, phase, acc, True)
    tma.store_wait(0)  # the last tile's last part leaves from the stage that is filled next
    for step in range(1, k_tiles - STAGES + 2):
        load_step(product, tile, step + STAGES - 2, stage_before(stage, STAGES), True)
        stage, phase = advance(stage, phase, STAGES)
        acc = multiply_step(product, stage, phase, acc, False)
    for part in gl.static_range(STAGES - 1):
        first_f = tile.column_tile * BLOCK_N + part * 2 * PART
        _load_h(product, h, stage_before(stage, STAGES), tile.first_row, first_f, LAYOUT)
        stage, phase = advance(stage, phase, STAGES)
        if part < STAGES - 2:
            acc = multiply_step(product, stage, phase, acc, False)
    return warpgroup_mma_wait(0, deps=(acc,)), stage, phase


@gluon.jit
def _differentiate_tile(
    product,
    h,
    grad_a,
    scale,
    grad_h,
    scaled_a,
    tile,
    ahead,
    ahead_exists,
    stage,
    phase,
    alpha,
    limit,
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The tile's part of dS, [BLOCK_M], and stage and phase after it, with the first steps ahead under way."""
    STAGES: gl.constexpr = product.x_tiles.shape[0]
    PARTS: gl.constexpr = BLOCK_N // (2 * PART)
    H_STORES: gl.constexpr = 0 if grad_h is None else (2 if LAYOUT == "concatenated" else 1)
    STORES: gl.constexpr = H_STORES if scaled_a is None else H_STORES + 1  # of a tile of PART columns
    grads = split_columns(grad_a, 2 * PARTS)
    grad_scale = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, PART_LAYOUT))
    for part in gl.static_range(PARTS):
        mbarrier.wait(product.ready.index(stage), phase)
        for half in gl.static_range(2):
            first_f = tile.column_tile * BLOCK_N + (2 * part + half) * PART
            grad_scale += _differentiate_half(
                gl.convert_layout(grads[2 * part + half], PART_LAYOUT, assert_trivial=True),
                scale,
                _h_tiles(product, h, stage, LAYOUT),
                product.x_tiles.index(stage),
                grad_h,
                scaled_a,
                tile.first_row,
                tile.end_row,
                first_f,
                alpha,
                limit,
                half,
                ACTIVATION,
                LAYOUT,
            )
            if half == 0:
                # By now the part before this one has left: what comes STAGES - 1 positions on takes its place.
                tma.store_wait(STORES)
                free = stage_before(stage, STAGES)
                if part + STAGES - 1 < PARTS:
                    _load_h(product, h, free, tile.first_row, first_f + (STAGES - 1) * 2 * PART, LAYOUT)
                else:
                    load_step(product, ahead, part + STAGES - 1 - PARTS, free, ahead_exists)
        stage, phase = advance(stage, phase, STAGES)
    return grad_scale, stage, phase


@gluon.jit
def glu_backward_kernel(
    grad_out,
    weight,
    h,
    grad_h,
    scaled_a,
    topk_weights_ptr,
    partials_ptr,
    order_ptr,
    tile_map_ptr,
    distances_ptr,
    alpha,
    limit,
    f_size,
    k_size,
    num_partials,
    stride_grad,
    grad_size,
    GRAD_DIVISOR: gl.constexpr,
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Everything 16 bits wide but gathered rows is read and written by TMA, see glu_forward about them.

    dH takes the place of h in shared memory, part by part.
    """
    x_tiles, w_tiles, ready = make_stages(weight, N_MAJOR, STAGES)
    product = Product(grad_out, stride_grad, grad_size, weight, x_tiles, w_tiles, ready, 0, BOX, None)
    num_rows, num_columns = gl.load(tile_map_ptr), gl.cdiv(f_size, BLOCK_N)
    tiles = Tiles(tile_map_ptr, order_ptr, distances_ptr, None, num_rows, num_columns, GRAD_DIVISOR, GROUP_M)
    first, hop = gl.program_id(0), gl.num_programs(0)
    here = first_operands(product, tiles)
    stage, phase = 0, 0
    for number in range(first, num_tiles(tiles), hop):
        place_ahead = place_of(tiles, number + hop)
        rows = here.first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PART_LAYOUT))
        valid = rows < here.end_row
        slots = gl.load(order_ptr + rows, mask=valid, other=0)
        scale = gl.load(topk_weights_ptr + slots, mask=valid, other=0.0).to(gl.float32)[:, None]
        acc, stage, phase = _multiply_tile(product, h, here, stage, phase, k_size, LAYOUT)
        ahead = operands_at(tiles, place_ahead)
        exists = number + hop < num_tiles(tiles)
        grad_scale, stage, phase = _differentiate_tile(
            product,
            h,
            acc,
            scale,
            grad_h,
            scaled_a,
            here,
            ahead,
            exists,
            stage,
            phase,
            alpha,
            limit,
            ACTIVATION,
            LAYOUT,
        )
        if partials_ptr is not None:
            gl.store(partials_ptr + slots.to(gl.int64) * num_partials + here.column_tile, grad_scale, mask=valid)
        here = ahead
    tma.store_wait(0)
    if GRAD_DIVISOR is not None:
        async_copy.wait_group(0)
