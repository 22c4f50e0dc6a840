"""scatter_ops.kernels.weight_grad on Hopper: loads and stores run beside the products.

    loading warps    rows of both operands, grouped ones by TMA, gathered ones by copies of 16 bytes -> ring of stages
    product warps    ring of stages -> accumulator -> out, as hopper_grouped_gemm.py says

Tiles of the experts with the most rows take longest. They are dealt first, and in turns back and forth, so that all
programs end at about the same time. See hopper.py.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
    UNIT,
    advance,
    make_barriers,
    stage_before,
    thread_barrier,
)
from scatter_ops.kernels.mainloop import tile_position

LOADING_WARPS = gl.constexpr(4)
LOADING_REGISTERS = gl.constexpr(96)
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


class Operand(NamedTuple):
    """A ragged descriptor of grouped rows if divisor is None, else a pointer to rows of which slot // divisor is read.

    size: number of columns, None where all tiles are whole; it and stride count UNITs. tiles: its stages.
    """

    memory: Any
    size: Any
    stride: Any
    divisor: Any
    tiles: Any


class Ring(NamedTuple):
    """Barriers of each stage: the loading warps filled it, the product warps emptied it."""

    left: Any
    right: Any
    filled: Any
    emptied: Any


class Tiles(NamedTuple):
    """All tiles of the result."""

    order_ptr: Any
    offsets_ptr: Any
    heaviest_ptr: Any
    num_experts: Any
    p_tiles: Any
    q_tiles: Any
    group_p: Any


class Tile(NamedTuple):
    """Of an expert's gradient: the expert, its first row and the end of its rows, the tile's first row and column."""

    expert: Any
    start: Any
    end: Any
    first_p: Any
    first_q: Any


@gluon.jit
def _number_of_turn(turn):
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    return turn * num_programs + gl.where(turn % 2 == 0, program, num_programs - 1 - program)


@gluon.jit
def _num_turns(tiles):
    num_tiles = tiles.num_experts * tiles.p_tiles * tiles.q_tiles
    turns = num_tiles // gl.num_programs(0)
    return turns + (_number_of_turn(turns) < num_tiles).to(gl.int32)


@gluon.jit
def _tile_at(tiles, number):
    """Past the last tile: of an expert past the last, without rows."""
    tiles_per_expert = tiles.p_tiles * tiles.q_tiles
    place = number // tiles_per_expert
    p_tile, q_tile = tile_position(number - place * tiles_per_expert, tiles.p_tiles, tiles.q_tiles, tiles.group_p)
    exists = place < tiles.num_experts
    expert = gl.load(tiles.heaviest_ptr + place, mask=exists, other=tiles.num_experts)
    start = gl.load(tiles.offsets_ptr + expert - 1, mask=exists & (expert > 0), other=0)
    end = gl.load(tiles.offsets_ptr + expert, mask=exists, other=0)
    return Tile(expert, start, end, p_tile * BLOCK_M, q_tile * BLOCK_N)


@gluon.jit
def _num_steps(tile, BLOCK_ROWS: gl.constexpr):
    """At least one, of zeros where an expert has no rows."""
    return gl.maximum(gl.cdiv(tile.end - tile.start, BLOCK_ROWS), 1)


@gluon.jit
def _rows_of_step(tiles, first, end, BLOCK_ROWS: gl.constexpr):
    """Slots of a step's rows, and which are before the expert's end."""
    rows = first + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, GATHERED))
    return gl.load(tiles.order_ptr + rows, mask=rows < end, other=0), rows < end


@gluon.jit
def _gathered(operand, slots, first_column):
    """Where a step's rows are: pointers and, unless all tiles are whole, which columns exist."""
    columns = first_column + gl.arange(0, operand.tiles.shape[2], gl.SliceLayout(0, GATHERED))
    sources = (slots // operand.divisor).to(gl.int64)
    return operand.memory + sources[:, None] * (UNIT * operand.stride) + columns[None, :], columns


@gluon.jit
def _copy_gathered(operand, pointers, columns, valid, stage):
    """A step's rows, zeros beyond the expert's end and the last column."""
    mask = valid[:, None]
    if operand.size is not None:
        mask = mask & (columns < UNIT * operand.size)[None, :]
    async_copy.async_copy_global_to_shared(operand.tiles.index(stage), pointers, mask=mask)


@gluon.jit
def _copy_grouped(operand, first, end, first_column, stage, barrier):
    tile = operand.tiles.index(stage).reshape(operand.memory.block_type.shape)
    coordinates = [BOUND, end, BOUND - (end - first), first_column]
    tma.async_copy_global_to_shared(operand.memory, coordinates, barrier, tile)


@gluon.jit
def _load_step(ring, tile, step, rows, stage, phase):
    """Fill a stage, once it is empty, with the rows of a step. What comes after the wait should be short."""
    BLOCK_ROWS: gl.constexpr = ring.left.tiles.shape[1]
    LEFT_BYTES: gl.constexpr = BLOCK_ROWS * BLOCK_M * 2 if ring.left.divisor is None else 0
    RIGHT_BYTES: gl.constexpr = BLOCK_ROWS * BLOCK_N * 2 if ring.right.divisor is None else 0
    slots, valid = rows
    first = tile.start + step * BLOCK_ROWS
    barrier = ring.filled.index(stage)
    if ring.left.divisor is not None:
        left_pointers, left_columns = _gathered(ring.left, slots, tile.first_p)
    if ring.right.divisor is not None:
        right_pointers, right_columns = _gathered(ring.right, slots, tile.first_q)
    mbarrier.wait(ring.emptied.index(stage), phase)
    if ring.left.divisor is not None:
        _copy_gathered(ring.left, left_pointers, left_columns, valid, stage)
    if ring.right.divisor is not None:
        _copy_gathered(ring.right, right_pointers, right_columns, valid, stage)
    mbarrier.expect(barrier, LEFT_BYTES + RIGHT_BYTES)
    if ring.left.divisor is None:
        _copy_grouped(ring.left, first, tile.end, tile.first_p, stage, barrier)
    if ring.right.divisor is None:
        _copy_grouped(ring.right, first, tile.end, tile.first_q, stage, barrier)
    if LEFT_BYTES * RIGHT_BYTES == 0:
        async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def _load_tiles(ring, tiles):
    """What the loading warps do. Slots are loaded a step ahead, also beyond a tile's end, and tiles a tile ahead."""
    STAGES: gl.constexpr = ring.left.tiles.shape[0]
    BLOCK_ROWS: gl.constexpr = ring.left.tiles.shape[1]
    tile, ahead = _tile_at(tiles, _number_of_turn(0)), _tile_at(tiles, _number_of_turn(1))
    rows = _rows_of_step(tiles, tile.start, tile.end, BLOCK_ROWS)
    stage, phase = 0, 1
    for turn in range(_num_turns(tiles)):
        after = _tile_at(tiles, _number_of_turn(turn + 2))
        steps = _num_steps(tile, BLOCK_ROWS)
        for step in range(steps):
            is_last = step + 1 == steps
            next_row = gl.where(is_last, ahead.start, tile.start + (step + 1) * BLOCK_ROWS)
            next_end = gl.where(is_last, ahead.end, tile.end)
            next_rows = _rows_of_step(tiles, next_row, next_end, BLOCK_ROWS)
            _load_step(ring, tile, step, rows, stage, phase)
            rows = next_rows
            stage, phase = advance(stage, phase, STAGES)
        tile, ahead = ahead, after


@gluon.jit
def _multiply_step(ring, step, steps, stage, phase, acc):
    """acc plus the product of a stage, which is still being computed; the step before it is done, its stage is free."""
    mbarrier.wait(ring.filled.index(stage), phase)
    if ring.left.divisor is not None or ring.right.divisor is not None:
        fence_async_shared()
    left_tile = ring.left.tiles.index(stage).permute([1, 0])
    acc = warpgroup_mma(left_tile, ring.right.tiles.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    thread_barrier()
    # A number of steps that was carried from tile to tile has to be used here: Triton takes it for dead else.
    of_this_tile = (step > 0) & (step < steps)
    mbarrier.arrive(ring.emptied.index(stage_before(stage, ring.left.tiles.shape[0])), count=1, pred=of_this_tile)
    return acc


@gluon.jit
def _store_quarter(out, out_tiles, tile, number: gl.constexpr):
    """TMA drops what is beyond the last expert."""
    quarter = out_tiles.index(number).reshape(out.block_type.shape)
    tma.async_copy_shared_to_global(out, [tile.expert, tile.first_p, tile.first_q + number * QUARTER], quarter)


@gluon.jit
def _multiply_tiles(ring, tiles, out, out_tiles):
    """What the product's warps do."""
    STAGES: gl.constexpr = ring.left.tiles.shape[0]
    BLOCK_ROWS: gl.constexpr = ring.left.tiles.shape[1]
    finished = _tile_at(tiles, tiles.num_experts * tiles.p_tiles * tiles.q_tiles)
    tile = _tile_at(tiles, _number_of_turn(0))
    stage, phase = 0, 0
    for turn in range(_num_turns(tiles)):
        ahead = _tile_at(tiles, _number_of_turn(turn + 1))
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, ACCUMULATOR)
        steps = _num_steps(tile, BLOCK_ROWS)
        for part in gl.static_range(4):
            for step in range(steps * part // 4, steps * (part + 1) // 4):
                acc = _multiply_step(ring, step, steps, stage, phase, acc)
                stage, phase = advance(stage, phase, STAGES)
            _store_quarter(out, out_tiles, finished, part)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        thread_barrier()
        mbarrier.arrive(ring.emptied.index(stage_before(stage, STAGES)), count=1)
        quarters = split_columns(acc, 4)
        tma.store_wait(0)
        for part in gl.static_range(4):
            out_tiles.index(part).store(quarters[part].to(out.dtype))
        fence_async_shared()
        finished, tile = tile, ahead
    for part in gl.static_range(4):
        _store_quarter(out, out_tiles, finished, part)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_experts"])
def weight_grad_kernel(
    left,
    right,
    out,
    order_ptr,
    offsets_ptr,
    heaviest_ptr,
    num_experts,
    p_size,
    q_size,
    stride_left,
    left_size,
    stride_right,
    right_size,
    LEFT_DIVISOR: gl.constexpr,
    RIGHT_DIVISOR: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_P: gl.constexpr,
):
    """out is a descriptor of [E, P, Q] in quarters of tiles. About left and right see Operand, strides and sizes are
    None where divisors are.
    """
    ARRIVALS: gl.constexpr = 1 if LEFT_DIVISOR is None and RIGHT_DIVISOR is None else 1 + 32 * LOADING_WARPS
    left_tiles = gl.allocate_shared_memory(out.dtype, [STAGES, BLOCK_ROWS, BLOCK_M], SWIZZLED)
    right_tiles = gl.allocate_shared_memory(out.dtype, [STAGES, BLOCK_ROWS, BLOCK_N], SWIZZLED)
    out_tiles = gl.allocate_shared_memory(out.dtype, [4, BLOCK_M, QUARTER], SWIZZLED)
    ring = Ring(
        Operand(left, left_size, stride_left, LEFT_DIVISOR, left_tiles),
        Operand(right, right_size, stride_right, RIGHT_DIVISOR, right_tiles),
        make_barriers(STAGES, ARRIVALS),
        make_barriers(STAGES, 1),
    )
    p_tiles, q_tiles = gl.cdiv(p_size, BLOCK_M), gl.cdiv(q_size, BLOCK_N)
    tiles = Tiles(order_ptr, offsets_ptr, heaviest_ptr, num_experts, p_tiles, q_tiles, GROUP_P)
    gl.warp_specialize(
        [(_multiply_tiles, (ring, tiles, out, out_tiles)), (_load_tiles, (ring, tiles))],
        [LOADING_WARPS],
        [LOADING_REGISTERS],
    )
