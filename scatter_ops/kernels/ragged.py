"""Tiles of a few consecutive rows of a [rows, columns] tensor by TMA, clipped where an expert's rows end.

The descriptor comes from triton.tools.ragged_tma.create_ragged_descriptor, which explains the two leading
coordinates: the row coordinate is chosen so that `end_row` lies on the descriptor's bound, and the other two bring
the address back to `first_row`. Loads beyond end_row give zeros, stores beyond it are dropped by the hardware: no
masks, and no other expert's rows are touched.
"""

import triton
import triton.language as tl

_BOUND = tl.constexpr(1 << 30)


@triton.jit
def load_rows(descriptor, first_row, end_row, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    tile = descriptor.load([_BOUND, end_row, _BOUND - (end_row - first_row), first_column])
    return tile.reshape(BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def store_rows(descriptor, tile, first_row, end_row, first_column):
    tile = tile.to(descriptor.dtype).reshape(1, 1, tile.shape[0], tile.shape[1])
    descriptor.store([_BOUND, end_row, _BOUND - (end_row - first_row), first_column], tile)


@triton.jit
def store_rows_of_way(descriptor, tile, first_row, end_row, way, first_column):
    """The same for a tensor [rows, ways, columns]."""
    tile = tile.to(descriptor.dtype).reshape(1, 1, tile.shape[0], 1, tile.shape[1])
    descriptor.store([_BOUND, end_row, _BOUND - (end_row - first_row), way, first_column], tile)
