"""Scheduling metadata of grouped GEMMs, computed on the device from offsets.

    tile_map = [number of row tiles, expert of tile 0, its first row, end of the expert's rows, expert of tile 1, ...]
    inverse[slot] = grouped row of the slot, or -1 - row for a sentinel
    heaviest = the experts, those with the most rows first

A row tile never crosses an expert's end, so there are at most cdiv(N, BLOCK_M) + E of them.
Legend: N slots, E experts.
"""

import triton
import triton.language as tl


@triton.jit
def _write_expert(
    offsets_ptr,
    tile_map_ptr,
    heaviest_ptr,
    expert,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    experts = tl.arange(0, BINS)
    in_range = experts < NUM_EXPERTS
    ends = tl.load(offsets_ptr + experts, mask=in_range, other=0)
    starts = tl.load(offsets_ptr + experts - 1, mask=in_range & (experts > 0), other=0)
    rows = tl.where(in_range, ends - starts, 0)
    tiles = tl.cdiv(rows, BLOCK_M)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    num_tiles = tl.sum(tl.where(experts == expert, tiles, 0))
    first_row = tl.sum(tl.where(experts == expert, starts, 0))
    end_row = tl.sum(tl.where(experts == expert, ends, 0))
    own_rows = end_row - first_row
    heavier = (rows > own_rows) | ((rows == own_rows) & (experts < expert))
    tl.store(heaviest_ptr + tl.sum((heavier & in_range).to(tl.int32)), expert)
    for begin in range(0, num_tiles, BINS):
        tile = begin + experts
        entry = tile_map_ptr + 1 + 3 * (first_tile + tile)
        tl.store(entry, tl.zeros_like(tile) + expert, mask=tile < num_tiles)
        tl.store(entry + 1, first_row + tile * BLOCK_M, mask=tile < num_tiles)
        tl.store(entry + 2, tl.zeros_like(tile) + end_row, mask=tile < num_tiles)
    if expert == 0:
        tl.store(tile_map_ptr, tl.sum(tiles))


@triton.jit(do_not_specialize=["num_slots"])
def schedule_kernel(
    order_ptr,
    offsets_ptr,
    inverse_ptr,
    tile_map_ptr,
    heaviest_ptr,
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first NUM_EXPERTS programs write what concerns an expert, the others BLOCK entries of inverse (if any)."""
    program = tl.program_id(0)
    if program < NUM_EXPERTS:
        _write_expert(offsets_ptr, tile_map_ptr, heaviest_ptr, program, NUM_EXPERTS, BINS, BLOCK_M)
    elif inverse_ptr is not None:
        row = (program - NUM_EXPERTS) * BLOCK + tl.arange(0, BLOCK)
        num_routed = tl.load(offsets_ptr + NUM_EXPERTS - 1)
        slot = tl.load(order_ptr + row, mask=row < num_slots, other=0)
        tl.store(inverse_ptr + slot, tl.where(row < num_routed, row, -1 - row), mask=row < num_slots)
