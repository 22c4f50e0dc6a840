"""The columns of a tile in equal parts, in order. Portable kernels call it, and Hopper's."""

import triton
import triton.language as tl


@triton.jit
def _halves(tile):
    return tl.split(tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute([0, 2, 1]))


@triton.jit
def _quarters(tile):
    left, right = _halves(tile)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def split_columns(tile, PARTS: tl.constexpr):
    """PARTS is 1, 2, 4 or 8."""
    if PARTS == 1:
        parts = (tile,)
    elif PARTS == 2:
        parts = _halves(tile)
    elif PARTS == 4:
        parts = _quarters(tile)
    else:
        tl.static_assert(PARTS == 8, "parts: 1, 2, 4 or 8")
        left, right = _halves(tile)
        parts = _quarters(left) + _quarters(right)
    return parts
