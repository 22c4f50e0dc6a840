"""Tiles of Hopper's kernels: a ring of stages in shared memory that serves the product and the epilogue alike.

The same tiles and operands as in scatter_ops.kernels.mainloop, written in Gluon, Triton's lower level, because there
loads and stores run beside an epilogue. The ring's positions are, for one tile after the other,

    k_tiles steps of the product, each a tile of x and one of the weight, then
    the epilogue's parts of 2 * PART columns, which are worked on and leave from where they are.

A position is prefetched STAGES - 1 positions ahead, also beyond a tile's end. `ready` has a barrier for each stage;
(stage, phase) is where the ring is and the phase of that barrier. Legend: N slots, E experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 has another name for it than 3.6.
thread_barrier = getattr(gl, "barrier" if hasattr(gl, "barrier") else "thread_barrier")

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
PART = gl.constexpr(32)
BOUND = gl.constexpr(1 << 30)  # of ragged descriptors: see scatter_ops.kernels.ragged
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 256, 16]))
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
def advance(stage, phase, STAGES: gl.constexpr):
    """The stage after this one, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def make_barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def expert_coordinate(distances_ptr, expert):
    """The expert's coordinate in the weight's descriptor."""
    if distances_ptr is not None:
        expert = gl.load(distances_ptr + expert).to(gl.int32)
    return expert


@gluon.jit
def load_step(
    x,
    weight,
    x_tiles,
    w_tiles,
    ready,
    stage,
    first_row,
    expert,
    first_column,
    k,
    pred,
    N_MAJOR: gl.constexpr,
):
    barrier = ready.index(stage)
    W_BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    X_BYTES: gl.constexpr = BLOCK_M * BLOCK_K * 2
    mbarrier.expect(barrier, W_BYTES + X_BYTES, pred)
    tma.async_copy_global_to_shared(x, [first_row, k], barrier, x_tiles.index(stage), pred)
    if N_MAJOR:
        tma.async_copy_global_to_shared(weight, [expert, k, 0, first_column], barrier, w_tiles.index(stage), pred)
    else:
        tma.async_copy_global_to_shared(weight, [expert, 0, first_column, k], barrier, w_tiles.index(stage), pred)


@gluon.jit
def multiply_step(x_tiles, w_tiles, ready, stage, phase, acc, FIRST: gl.constexpr, N_MAJOR: gl.constexpr):
    """acc (0 if FIRST) plus the product of a stage, which is still being computed; the step before it is done."""
    mbarrier.wait(ready.index(stage), phase)
    if N_MAJOR:
        w_tile = w_tiles.index(stage).reshape([BLOCK_K, BLOCK_N])
    else:
        w_tile = w_tiles.index(stage).reshape([BLOCK_N, BLOCK_K]).permute([1, 0])
    acc = warpgroup_mma(x_tiles.index(stage), w_tile, acc, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def halves(tile):
    """Left and right columns."""
    return gl.split(tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute([0, 2, 1]))


@gluon.jit
def quarters(tile):
    left, right = halves(tile)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@gluon.jit
def zero_unrouted_rows(out_ptr, offsets_ptr, num_rows, num_columns, num_experts, LAYOUT: gl.constexpr):
    """Exact zeros in the rows of sentinel slots of [rows, columns], shared among all programs."""
    columns = gl.arange(0, 1024, LAYOUT)
    zeros = gl.zeros([1024], out_ptr.dtype.element_ty, LAYOUT)
    first = gl.load(offsets_ptr + num_experts - 1)
    for row in range(first + gl.program_id(0), num_rows, gl.num_programs(0)):
        for start in range(0, num_columns, 1024):
            pointers = out_ptr + row.to(gl.int64) * num_columns + start + columns
            gl.store(pointers, zeros, mask=start + columns < num_columns)


@gluon.jit
def store_part(descriptor, tile, coordinates):
    """Write a tile in shared memory to where its expert's rows end; `coordinates` are those of a ragged descriptor."""
    tma.async_copy_shared_to_global(descriptor, coordinates, tile.reshape(descriptor.block_type.shape))
