"""scatter_ops.kernels.glu_backward on Hopper, for router weights on the output: h, dH and A by TMA, see hopper.py."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from scatter_ops.kernels.activation import activate_backward
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    BOUND,
    PAIRS_LAYOUT,
    PART,
    PART_LAYOUT,
    advance,
    expert_coordinate,
    halves,
    load_step,
    make_barriers,
    multiply_step,
    quarters,
    stage_before,
    store_part,
)
from scatter_ops.kernels.mainloop import load_tile


@gluon.jit
def _load_part(h, h_tiles, ready, stage, first_row, first_f, LAYOUT: gl.constexpr):
    """2 * PART columns of gate and up in 4 tiles (gate, up, gate, up), or 2 (gate alone if plain, else interleaved)."""
    barrier = ready.index(stage)
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


@gluon.jit
def _gate_and_up(h_tiles, half: gl.constexpr, LAYOUT: gl.constexpr):
    """Their tiles in shared memory, and what is in them. up is gate if plain."""
    if LAYOUT == "concatenated":
        gate_tile = h_tiles.index(2 * half).reshape([BLOCK_M, PART])
        up_tile = h_tiles.index(2 * half + 1).reshape([BLOCK_M, PART])
        gate = gate_tile.load(PART_LAYOUT)
        up = up_tile.load(PART_LAYOUT)
    elif LAYOUT == "interleaved":
        gate_tile = h_tiles.index(half)
        up_tile = gate_tile
        gate, up = gl.split(gate_tile.load(PAIRS_LAYOUT).reshape([BLOCK_M, PART, 2]))
        gate = gl.convert_layout(gate, PART_LAYOUT, assert_trivial=True)
        up = gl.convert_layout(up, PART_LAYOUT, assert_trivial=True)
    else:
        gate_tile = h_tiles.index(half)
        up_tile = gate_tile
        gate = gate_tile.load(PART_LAYOUT)
        up = gate
    return gate_tile, up_tile, gate.to(gl.float32), up.to(gl.float32)


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
    gate_tile, up_tile, gate, up = _gate_and_up(h_tiles, half, LAYOUT)
    a, grad_gate, grad_up = activate_backward(gate, up, grad_a * scale, alpha, limit, ACTIVATION, LAYOUT != "plain")
    if grad_h is not None:
        if LAYOUT == "interleaved":
            gate_tile.store(gl.join(grad_gate, grad_up).reshape([BLOCK_M, 2 * PART]).to(DTYPE))
        else:
            gate_tile.store(grad_gate.to(DTYPE))
        if LAYOUT == "concatenated":
            up_tile.store(grad_up.to(DTYPE))
    if scaled_a is not None:
        a_tile = a_tiles._reinterpret(DTYPE, [2] + scaled_a.block_type.shape, scaled_a.layout).index(half)
        a_tile.reshape([BLOCK_M, PART]).store((a * scale).to(DTYPE))
    fence_async_shared()
    ragged_row = BOUND - (end_row - first_row)
    if grad_h is not None:
        if LAYOUT == "concatenated":
            store_part(grad_h, gate_tile, [BOUND, end_row, ragged_row, 0, first_f])
            store_part(grad_h, up_tile, [BOUND, end_row, ragged_row, 1, first_f])
        else:
            STEP: gl.constexpr = 2 if LAYOUT == "interleaved" else 1
            store_part(grad_h, gate_tile, [BOUND, end_row, ragged_row, STEP * first_f])
    if scaled_a is not None:
        store_part(scaled_a, a_tile, [BOUND, end_row, ragged_row, first_f])
    return gl.sum(grad_a * a, 1)


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
    ACTIVATION: gl.constexpr,
    LAYOUT: gl.constexpr,
    N_MAJOR: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Everything 16 bits wide is read and written by TMA. dH takes the place of h in shared memory, part by part."""
    H_TILES: gl.constexpr = 4 if LAYOUT == "concatenated" else 2
    PARTS: gl.constexpr = BLOCK_N // (2 * PART)
    DTYPE: gl.constexpr = h.dtype
    H_STORES: gl.constexpr = 0 if grad_h is None else H_TILES // 2
    STORES: gl.constexpr = H_STORES if scaled_a is None else H_STORES + 1  # of a tile of PART columns
    x_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], grad_out.layout)
    w_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + weight.block_type.shape, weight.layout)
    ready = make_barriers(STAGES)
    fence_async_shared()

    num_row_tiles = gl.load(tile_map_ptr)
    num_column_tiles = gl.cdiv(f_size, BLOCK_N)
    num_tiles = num_row_tiles * num_column_tiles
    k_tiles = gl.cdiv(k_size, BLOCK_K)
    first_tile, hop = gl.program_id(0), gl.num_programs(0)
    expert, first_row, end_row, column_tile = load_tile(
        tile_map_ptr, first_tile, num_row_tiles, num_column_tiles, GROUP_M
    )
    expert = expert_coordinate(distances_ptr, expert)
    for early in gl.static_range(STAGES - 1):
        load_step(
            grad_out,
            weight,
            x_tiles,
            w_tiles,
            ready,
            early,
            first_row,
            expert,
            column_tile * BLOCK_N,
            early * BLOCK_K,
            first_tile < num_tiles,
            N_MAJOR,
        )
    stage, phase = 0, 0
    for tile in range(first_tile, num_tiles, hop):
        next_expert, next_row, next_end, next_column = load_tile(
            tile_map_ptr, tile + hop, num_row_tiles, num_column_tiles, GROUP_M
        )
        rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PART_LAYOUT))
        valid = rows < end_row
        slots = gl.load(order_ptr + rows, mask=valid, other=0)
        scale = gl.load(topk_weights_ptr + slots, mask=valid, other=0.0).to(gl.float32)[:, None]
        first_f = column_tile * BLOCK_N
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        # No branch between products: one would make the compiler wait for each of them.
        acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, True, N_MAJOR)
        tma.store_wait(0)  # the last tile's last part leaves from the stage that is filled next
        for step in range(1, k_tiles - STAGES + 2):
            load_step(
                grad_out,
                weight,
                x_tiles,
                w_tiles,
                ready,
                stage_before(stage, STAGES),
                first_row,
                expert,
                first_f,
                (step + STAGES - 2) * BLOCK_K,
                True,
                N_MAJOR,
            )
            stage, phase = advance(stage, phase, STAGES)
            acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, N_MAJOR)
        for part in gl.static_range(STAGES - 1):
            free = stage_before(stage, STAGES)
            h_tiles = w_tiles.index(free)._reinterpret(DTYPE, [H_TILES] + h.block_type.shape, h.layout)
            _load_part(h, h_tiles, ready, free, first_row, first_f + part * 2 * PART, LAYOUT)
            stage, phase = advance(stage, phase, STAGES)
            if part < STAGES - 2:
                acc = multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, False, N_MAJOR)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        next_expert = expert_coordinate(distances_ptr, next_expert)
        left, right = halves(acc)
        grads = quarters(left) + quarters(right)
        grad_scale = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, PART_LAYOUT))
        for part in gl.static_range(PARTS):
            mbarrier.wait(ready.index(stage), phase)
            h_tiles = w_tiles.index(stage)._reinterpret(DTYPE, [H_TILES] + h.block_type.shape, h.layout)
            a_tiles = x_tiles.index(stage)
            for half in gl.static_range(2):
                grad_scale += _differentiate_half(
                    gl.convert_layout(grads[2 * part + half], PART_LAYOUT, assert_trivial=True),
                    scale,
                    h_tiles,
                    a_tiles,
                    grad_h,
                    scaled_a,
                    first_row,
                    end_row,
                    first_f + (2 * part + half) * PART,
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
                        free_tiles = w_tiles.index(free)._reinterpret(DTYPE, [H_TILES] + h.block_type.shape, h.layout)
                        _load_part(
                            h, free_tiles, ready, free, first_row, first_f + (part + STAGES - 1) * 2 * PART, LAYOUT
                        )
                    else:
                        load_step(
                            grad_out,
                            weight,
                            x_tiles,
                            w_tiles,
                            ready,
                            free,
                            next_row,
                            next_expert,
                            next_column * BLOCK_N,
                            (part + STAGES - 1 - PARTS) * BLOCK_K,
                            tile + hop < num_tiles,
                            N_MAJOR,
                        )
            stage, phase = advance(stage, phase, STAGES)
        if partials_ptr is not None:
            gl.store(partials_ptr + slots.to(gl.int64) * num_partials + column_tile, grad_scale, mask=valid)
        expert, first_row, end_row, column_tile = next_expert, next_row, next_end, next_column
    tma.store_wait(0)
