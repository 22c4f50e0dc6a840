"""scatter_ops.kernels.weight_grad on Hopper, of grouped rows: loads and stores run beside the products.

Tiles of the experts with the most rows take longest. They are dealt first, and in turns back and forth, so that all
programs end at about the same time. A program's tiles are one stream of steps of BLOCK_ROWS rows, each prefetched
STAGES - 1 steps ahead, also beyond a tile's end. A finished tile leaves as hopper_grouped_gemm.py says. See hopper.py.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from scatter_ops.kernels.columns import split_columns
from scatter_ops.kernels.hopper import (
    ACCUMULATOR,
    BLOCK_M,
    BLOCK_N,
    BOUND,
    QUARTER,
    SWIZZLED,
    advance,
    make_barriers,
    stage_before,
)
from scatter_ops.kernels.mainloop import tile_position

BLOCK_ROWS = gl.constexpr(64)


class Product(NamedTuple):
    """Ragged descriptors of the operands, their stages and barriers."""

    left: Any
    right: Any
    left_tiles: Any
    right_tiles: Any
    ready: Any


class Tile(NamedTuple):
    """Of an expert's gradient: the expert, its first row and the end of its rows, the tile's first row and column."""

    expert: Any
    start: Any
    end: Any
    first_p: Any
    first_q: Any


@gluon.jit
def _tile_of_turn(turn):
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    return turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)


@gluon.jit
def _load_tile(offsets_ptr, heaviest_ptr, tile, num_experts, p_tiles, q_tiles, GROUP_P: gl.constexpr):
    """Past the last tile: of an expert past the last, without rows."""
    tiles_per_expert = p_tiles * q_tiles
    place = tile // tiles_per_expert
    p_tile, q_tile = tile_position(tile - place * tiles_per_expert, p_tiles, q_tiles, GROUP_P)
    exists = place < num_experts
    expert = gl.load(heaviest_ptr + place, mask=exists, other=num_experts)
    start = gl.load(offsets_ptr + expert - 1, mask=exists & (expert > 0), other=0)
    end = gl.load(offsets_ptr + expert, mask=exists, other=0)
    return Tile(expert, start, end, p_tile * BLOCK_M, q_tile * BLOCK_N)


@gluon.jit
def _load_step(product, tile, step, stage, pred):
    """The rows of a step, zeros beyond the expert's end."""
    barrier = product.ready.index(stage)
    row = BOUND - (tile.end - tile.start - step * BLOCK_ROWS)
    left_tile = product.left_tiles.index(stage).reshape(product.left.block_type.shape)
    right_tile = product.right_tiles.index(stage).reshape(product.right.block_type.shape)
    mbarrier.expect(barrier, BLOCK_ROWS * (BLOCK_M + BLOCK_N) * 2, pred)
    tma.async_copy_global_to_shared(product.left, [BOUND, tile.end, row, tile.first_p], barrier, left_tile, pred)
    tma.async_copy_global_to_shared(product.right, [BOUND, tile.end, row, tile.first_q], barrier, right_tile, pred)


@gluon.jit
def _multiply_step(product, stage, phase, acc):
    """acc plus the product of a stage, which is still being computed; the step before it is done."""
    mbarrier.wait(product.ready.index(stage), phase)
    left_tile = product.left_tiles.index(stage).permute([1, 0])
    acc = warpgroup_mma(left_tile, product.right_tiles.index(stage), acc, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _store_quarter(out, out_tiles, tile, number: gl.constexpr):
    """TMA drops what is beyond the last expert."""
    quarter = out_tiles.index(number).reshape(out.block_type.shape)
    tma.async_copy_shared_to_global(out, [tile.expert, tile.first_p, tile.first_q + number * QUARTER], quarter)


@gluon.jit(do_not_specialize=["num_experts"])
def weight_grad_kernel(
    left,
    right,
    out,
    offsets_ptr,
    heaviest_ptr,
    num_experts,
    p_size,
    q_size,
    STAGES: gl.constexpr,
    GROUP_P: gl.constexpr,
):
    """left and right are ragged descriptors, out is one of [E, P, Q] in quarters of tiles."""
    left_tiles = gl.allocate_shared_memory(out.dtype, [STAGES, BLOCK_ROWS, BLOCK_M], SWIZZLED)
    right_tiles = gl.allocate_shared_memory(out.dtype, [STAGES, BLOCK_ROWS, BLOCK_N], SWIZZLED)
    out_tiles = gl.allocate_shared_memory(out.dtype, [4, BLOCK_M, QUARTER], SWIZZLED)
    product = Product(left, right, left_tiles, right_tiles, make_barriers(STAGES))

    p_tiles, q_tiles = gl.cdiv(p_size, BLOCK_M), gl.cdiv(q_size, BLOCK_N)
    num_tiles = num_experts * p_tiles * q_tiles
    turns = num_tiles // gl.num_programs(0)
    turns += (_tile_of_turn(turns) < num_tiles).to(gl.int32)
    tile = _load_tile(offsets_ptr, heaviest_ptr, _tile_of_turn(0), num_experts, p_tiles, q_tiles, GROUP_P)
    finished = _load_tile(offsets_ptr, heaviest_ptr, num_tiles, num_experts, p_tiles, q_tiles, GROUP_P)
    for early in gl.static_range(STAGES - 1):
        _load_step(product, tile, early, early, turns > 0)
    stage, phase = 0, 0
    for turn in range(turns):
        number = _tile_of_turn(turn + 1)
        next_tile = _load_tile(offsets_ptr, heaviest_ptr, number, num_experts, p_tiles, q_tiles, GROUP_P)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        # A tile has at least the STAGES - 1 steps that were loaded ahead: of zeros, where its expert has no rows.
        steps = gl.maximum(gl.cdiv(tile.end - tile.start, BLOCK_ROWS) - (STAGES - 1), 0)
        for part in gl.static_range(4):
            for step in range(steps * part // 4, steps * (part + 1) // 4):
                acc = _multiply_step(product, stage, phase, acc)
                _load_step(product, tile, step + STAGES - 1, stage_before(stage, STAGES), True)
                stage, phase = advance(stage, phase, STAGES)
            _store_quarter(out, out_tiles, finished, part)
        for early in gl.static_range(STAGES - 1):
            acc = _multiply_step(product, stage, phase, acc)
            _load_step(product, next_tile, early, stage_before(stage, STAGES), turn + 1 < turns)
            stage, phase = advance(stage, phase, STAGES)
        quarters = split_columns(warpgroup_mma_wait(0, deps=(acc,)), 4)
        tma.store_wait(0)
        for part in gl.static_range(4):
            out_tiles.index(part).store(quarters[part].to(out.dtype))
        fence_async_shared()
        finished, tile = tile, next_tile
    for part in gl.static_range(4):
        _store_quarter(out, out_tiles, finished, part)
    tma.store_wait(0)
