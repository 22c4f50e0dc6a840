"""Tiles of Hopper's kernels: a ring of stages in shared memory that serves the product and the epilogue alike.

The same tiles and operands as in scatter_ops.kernels.mainloop, written in Gluon, Triton's lower level, because there
loads and stores run beside an epilogue. The ring's positions are, for one tile after the other,

    k_tiles steps of the product, each a tile of x and one of the weight, then
    the epilogue's parts, if they come through the ring: they are worked on and leave from where they are.

A position is prefetched STAGES - 1 positions ahead, also beyond a tile's end. `ready` has a barrier for each stage;
(stage, phase) is where the ring is and the phase of that barrier. LAYOUT is that of glu.py. Legend: N slots.
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

from scatter_ops.kernels.mainloop import load_tile

# Triton 3.7 has another name for it than 3.6.
thread_barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
BOX = gl.constexpr(128)  # columns of a box of the weight
UNIT = gl.constexpr(8)  # elements of 16 bit that are copied at once
QUARTER = gl.constexpr(64)  # columns of a part of a tile that leaves at once
BOUND = gl.constexpr(1 << 30)  # of ragged descriptors: see scatter_ops.kernels.ragged
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 16]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
GATHERED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COLUMNS = gl.constexpr(gl.BlockedLayout([4], [32], [8], [0]))


class Product(NamedTuple):
    """The operands, their stages and barriers.

    x is a ragged descriptor of [rows, k] if stride_x is None, else a pointer to rows that are gathered. Rows beyond an
    expert's end are zeros either way: products of zeros take less power, which is what bounds the clock. A tile of the
    weight ([BLOCK_K, BLOCK_N] if n is contiguous in memory, else [BLOCK_N, BLOCK_K]) comes in two boxes, the second
    second_way ways and second_column columns after the first, maybe in another tensor. way_size: None unless the ways
    of the weight follow one another along k; then each is that long, and x is a descriptor of [rows, ways, k].

    stride_x and x_size count UNITs: as numbers of elements the compiler would not know them to be multiples. x_size is
    the number of columns, None where all steps are whole or TMA reads them, which gives zeros beyond the last one.
    """

    x: Any
    stride_x: Any
    x_size: Any
    weight: Any
    x_tiles: Any
    w_tiles: Any
    ready: Any
    second_way: Any
    second_column: Any
    way_size: Any


class Tiles(NamedTuple):
    """All tiles of the result. experts_per_way: None unless gate and up are in tensors of their own.

    divisor: None unless x's rows are gathered, row order[i] // divisor for grouped row i.
    """

    tile_map_ptr: Any
    order_ptr: Any
    distances_ptr: Any
    experts_per_way: Any
    num_row_tiles: Any
    num_column_tiles: Any
    divisor: Any
    group_m: Any


class Tile(NamedTuple):
    """What a tile's operands are found by.

    first_expert, second_expert: in the weight's descriptor, of both boxes, or of both ways along k. sources: rows of x,
    if they are gathered; valid: those before the expert's end.
    """

    first_row: Any
    end_row: Any
    column_tile: Any
    first_expert: Any
    second_expert: Any
    sources: Any
    valid: Any


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    fence_async_shared()
    return barriers


@gluon.jit
def make_stages(weight, N_MAJOR: gl.constexpr, STAGES: gl.constexpr):
    """x_tiles, w_tiles and ready of a Product."""
    W_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if N_MAJOR else [BLOCK_N, BLOCK_K]
    x_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    w_tiles = gl.allocate_shared_memory(weight.dtype, [STAGES] + W_SHAPE, SWIZZLED)
    ready = make_barriers(STAGES)
    return x_tiles, w_tiles, ready


@gluon.jit
def num_tiles(tiles):
    return tiles.num_row_tiles * tiles.num_column_tiles


@gluon.jit
def place_of(tiles, number):
    """Expert, first row, end of the expert's rows and column tile of a tile."""
    return load_tile(tiles.tile_map_ptr, number, tiles.num_row_tiles, tiles.num_column_tiles, tiles.group_m)


@gluon.jit
def operands_at(tiles, place):
    """The Tile at a place. Its loads wait for those of the place, so a product should be under way."""
    expert, first_row, end_row, column_tile = place
    first_expert = expert
    if tiles.distances_ptr is not None:
        first_expert = gl.load(tiles.distances_ptr + expert).to(gl.int32)
    second_expert = first_expert
    if tiles.experts_per_way is not None:
        second_expert = gl.load(tiles.distances_ptr + expert + tiles.experts_per_way).to(gl.int32)
    sources, valid = first_row, first_row  # nobody reads them unless x is gathered
    if tiles.divisor is not None:
        rows = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, GATHERED))
        valid = rows < end_row
        slots = gl.load(tiles.order_ptr + rows, mask=valid, other=0)
        sources = (slots // tiles.divisor).to(gl.int64)
    return Tile(first_row, end_row, column_tile, first_expert, second_expert, sources, valid)


@gluon.jit
def first_operands(product, tiles):
    """This program's first Tile, with its first steps under way."""
    STAGES: gl.constexpr = product.x_tiles.shape[0]
    number = gl.program_id(0)
    tile = operands_at(tiles, place_of(tiles, number))
    for early in gl.static_range(STAGES - 1):
        load_step(product, tile, early, early, number < num_tiles(tiles))
    return tile


@gluon.jit
def load_step(product, tile, step, stage, pred):
    """Fill a stage with a step's tile of x and of the weight; `ready` knows nothing of rows that are gathered."""
    k, way, expert = step * BLOCK_K, 0, tile.first_expert
    if product.way_size is not None:
        steps_of_way = gl.cdiv(product.way_size, BLOCK_K)
        in_second = step >= steps_of_way
        k -= gl.where(in_second, steps_of_way * BLOCK_K, 0)
        way = gl.where(in_second, 1, 0)
        expert = gl.where(in_second, tile.second_expert, expert)
    barrier = product.ready.index(stage)
    x_tile = product.x_tiles.index(stage)
    if product.stride_x is not None:
        columns = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, GATHERED))
        pointers = product.x + tile.sources[:, None] * (UNIT * product.stride_x) + columns[None, :]
        mask = tile.valid[:, None]
        if product.x_size is not None:
            mask = mask & (columns < UNIT * product.x_size)[None, :]
        async_copy.async_copy_global_to_shared(x_tile, pointers, mask=mask)
        async_copy.commit_group()
        mbarrier.expect(barrier, BLOCK_N * BLOCK_K * 2, pred)
    else:
        mbarrier.expect(barrier, (BLOCK_M + BLOCK_N) * BLOCK_K * 2, pred)
        row = BOUND - (tile.end_row - tile.first_row)
        place = [k] if product.way_size is None else [way, k]
        x_tile = x_tile.reshape(product.x.block_type.shape)
        tma.async_copy_global_to_shared(product.x, [BOUND, tile.end_row, row] + place, barrier, x_tile, pred)
    if product.way_size is None:
        _load_box(product, tile, expert, 0, k, barrier, stage, pred, 0)
        _load_box(product, tile, tile.second_expert, product.second_way, k, barrier, stage, pred, 1)
    else:
        way *= product.second_way
        _load_box(product, tile, expert, way, k, barrier, stage, pred, 0)
        _load_box(product, tile, expert, way, k, barrier, stage, pred, 1)


@gluon.jit
def _load_box(product, tile, expert, way, k, barrier, stage, pred, NUMBER: gl.constexpr):
    weight = product.weight
    box = product.w_tiles.index(stage)._reinterpret(weight.dtype, [2] + weight.block_type.shape, weight.layout)
    column = tile.column_tile * (BOX + product.second_column) + NUMBER * product.second_column
    coordinates = [expert, k, way, column] if product.w_tiles.shape[1] == BLOCK_K else [expert, way, column, k]
    tma.async_copy_global_to_shared(weight, coordinates, barrier, box.index(NUMBER), pred)


@gluon.jit
def multiply_step(product, stage, phase, acc, FIRST: gl.constexpr):
    """acc (0 if FIRST) plus the product of a stage, which is still being computed; the step before it is done."""
    if product.stride_x is not None:
        async_copy.wait_group(product.x_tiles.shape[0] - 2)
    mbarrier.wait(product.ready.index(stage), phase)
    w_tile = product.w_tiles.index(stage)
    if product.w_tiles.shape[1] != BLOCK_K:
        w_tile = w_tile.permute([1, 0])
    acc = warpgroup_mma(product.x_tiles.index(stage), w_tile, acc, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def multiply_and_load(product, tile, step, stage, phase, acc, pred):
    """multiply_step, with a step of a tile under way to the stage that is free by then; and where the ring is next."""
    STAGES: gl.constexpr = product.x_tiles.shape[0]
    acc = multiply_step(product, stage, phase, acc, False)
    load_step(product, tile, step, stage_before(stage, STAGES), pred)
    stage, phase = advance(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def load_gate_up(gate_tile, up_tile, LAYOUT: gl.constexpr, REGISTERS: gl.constexpr):
    """A part's gate and up in fp32: both in the gate's tile if interleaved; up is gate if plain."""
    gate = gate_tile.load(REGISTERS)
    up = gate
    if LAYOUT == "concatenated":
        up = up_tile.load(REGISTERS)
    elif LAYOUT == "interleaved":
        gate, up = gl.split(gate.reshape([gate.shape[0], gate.shape[1] // 2, 2]))
    return gate.to(gl.float32), up.to(gl.float32)


@gluon.jit
def store_gate_up(h, gate_tile, up_tile, first_row, end_row, first_f, LAYOUT: gl.constexpr):
    """Store a part of h, or of its gradient, from the tiles that load_gate_up reads."""
    if LAYOUT == "concatenated":
        _store(h, gate_tile, first_row, end_row, [0, first_f])
        _store(h, up_tile, first_row, end_row, [1, first_f])
    else:
        _store(h, gate_tile, first_row, end_row, [first_f * (2 if LAYOUT == "interleaved" else 1)])


@gluon.jit
def store_part(out, part, first_row, end_row, first_column):
    """Store a part in shared memory to a tile's rows, as far as they are its expert's; `out` is a ragged descriptor."""
    _store(out, part, first_row, end_row, [first_column])


@gluon.jit
def _store(out, part, first_row, end_row, columns):
    coordinates = [BOUND, end_row, BOUND - (end_row - first_row)] + columns
    tma.async_copy_shared_to_global(out, coordinates, part.reshape(out.block_type.shape))


@gluon.jit
def zero_unrouted_rows(out_ptr, offsets_ptr, num_rows, num_columns, num_experts):
    """Exact zeros in the rows of sentinel slots of [rows, columns], shared among all programs."""
    columns = gl.arange(0, 1024, COLUMNS)
    zeros = gl.zeros([1024], out_ptr.dtype.element_ty, COLUMNS)
    first = gl.load(offsets_ptr + num_experts - 1)
    for row in range(first + gl.program_id(0), num_rows, gl.num_programs(0)):
        for start in range(0, num_columns, 1024):
            pointers = out_ptr + row.to(gl.int64) * num_columns + start + columns
            gl.store(pointers, zeros, mask=start + columns < num_columns)
