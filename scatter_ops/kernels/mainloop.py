"""What every grouped GEMM kernel shares: tile order, row indices, and the product of one tile.

A tile is BLOCK_M rows of one expert by BLOCK_N columns. Its left operand is `x`, rows read in place or gathered by
index; its right operand is the expert's weight, seen as [ways, n, k]: two ways are the gate and up halves of a
weight, either side by side in the columns of one tile (N_WAYS) or one after the other along the reduction (K_WAYS).

WEIGHT says what `weight` is: "strided" (a stacked tensor), "list" (an int64 array of base pointers, [ways, E] or [E])
or "tma" (a host-made tensor descriptor [E, ways, n, k], [E, k, ways, n] if N_MAJOR). The first dimension of a list's
descriptor counts what distances_ptr holds for each expert, and for the second way experts_per_way later if the ways are
in tensors of their own. X_TMA: `x` is a descriptor [rows, k]. Legend: N slots, E experts.
"""

import triton
import triton.language as tl

from scatter_ops.kernels.ragged import store_rows


@triton.jit
def tile_position(tile, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """Row and column tile of a tile number: GROUP_M row tiles share each weight tile while it is in the cache."""
    group_size = GROUP_M * num_column_tiles
    group = tile // group_size
    rows_in_group = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    within = tile - group * group_size
    return group * GROUP_M + within % rows_in_group, within // rows_in_group


@triton.jit
def load_tile(tile_map_ptr, tile, num_row_tiles, num_column_tiles, GROUP_M: tl.constexpr):
    """Expert, first row, end of the expert's rows and column tile of a tile; past the last tile: no rows.

    Persistent programs load it, and the slots of its rows, a tile ahead: loaded where they are used, each would cost
    the tensor cores a trip to memory.
    """
    row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_M)
    exists = tile < num_row_tiles * num_column_tiles
    entry = tile_map_ptr + 1 + 3 * row_tile
    expert = tl.load(entry, mask=exists, other=0)
    first_row = tl.load(entry + 1, mask=exists, other=0)
    end_row = tl.load(entry + 2, mask=exists, other=0)
    return expert, first_row, end_row, column_tile


@triton.jit
def load_slots(order_ptr, first_row, end_row, BLOCK_M: tl.constexpr, NEEDED: tl.constexpr):
    """Slots of a tile's rows, [BLOCK_M]; the rows' own numbers unless NEEDED."""
    rows = first_row + tl.arange(0, BLOCK_M)
    if NEEDED:
        slots = tl.load(order_ptr + rows, mask=rows < end_row, other=0)
    else:
        slots = rows
    return slots


@triton.jit
def source_rows(rows, slots, valid, DIVISOR: tl.constexpr):
    """Row to read (or write) for each grouped row: itself if DIVISOR is 0, else its slot // DIVISOR. 0 if invalid."""
    if DIVISOR == 0:
        result = tl.where(valid, rows, 0)
    else:
        result = slots // DIVISOR
    return result.to(tl.int64)


@triton.jit
def column_split(BLOCK_N: tl.constexpr, WAYS: tl.constexpr):
    """Way and column within the way of each column of a tile."""
    columns = tl.arange(0, BLOCK_N)
    return columns // (BLOCK_N // WAYS), columns % (BLOCK_N // WAYS)


@triton.jit
def expert_base(parameter, expert, stride_e, DTYPE: tl.constexpr, LIST: tl.constexpr):
    """Where an expert's parameter starts. Pointers in a list are known to be aligned to 16 bytes."""
    if LIST:
        base = tl.multiple_of(tl.load(parameter + expert).to(tl.pointer_type(DTYPE)), 16)
    else:
        base = parameter + expert.to(tl.int64) * stride_e
    return base


@triton.jit
def load_bias(bias, expert, columns, mask, stride_e, DTYPE: tl.constexpr, LIST: tl.constexpr):
    return tl.load(expert_base(bias, expert, stride_e, DTYPE, LIST) + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _experts_in_weight(right, DTYPE: tl.constexpr, WEIGHT: tl.constexpr, N_WAYS: tl.constexpr, K_WAYS: tl.constexpr):
    """Where the expert's first and second way are: numbers in a descriptor, or base pointers."""
    weight, expert, _, _, strides, experts_per_way, distances_ptr = right
    if WEIGHT == "tma":
        first = expert
        second = expert
        if distances_ptr is not None:
            first = tl.load(distances_ptr + expert).to(tl.int32)
            if K_WAYS > 1:
                second = tl.load(distances_ptr + expert + experts_per_way).to(tl.int32)
    else:
        first = expert_base(weight, expert, strides[0], DTYPE, WEIGHT == "list")
        second = first
        if WEIGHT == "list" and N_WAYS * K_WAYS > 1:
            second = expert_base(weight, expert + experts_per_way, strides[0], DTYPE, True)
    return first, second


@triton.jit
def _load_left(left, k_way, k_first, k_size, X_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of x."""
    x, rows, first_row, stride_x = left
    k = k_first + tl.arange(0, BLOCK_K)
    if X_TMA:
        tile = x.load([first_row, k_way * k_size + k_first])
    else:
        pointers = x + rows[:, None] * stride_x + (k_way * k_size + k)[None, :]
        if EVEN_K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(k < k_size)[None, :], other=0.0)
    return tile


@triton.jit
def _load_by_descriptor(
    right,
    experts,
    k_way,
    k_first,
    K_WAYS: tl.constexpr,
    N_MAJOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of an expert's weight."""
    weight, _, first_column, _, _, _, distances_ptr = right
    expert = experts[0]
    way = k_way
    if distances_ptr is not None and K_WAYS > 1:
        expert = tl.where(k_way == 0, experts[0], experts[1])
        way = 0
    if N_MAJOR:
        tile = weight.load([expert, k_first, way, first_column]).reshape(BLOCK_K, BLOCK_N)
    else:
        tile = weight.load([expert, way, first_column, k_first]).reshape(BLOCK_N, BLOCK_K).T
    return tile


@triton.jit
def _load_by_pointer(
    strides,
    bases,
    columns,
    k_way,
    k_first,
    k_size,
    N_WAYS: tl.constexpr,
    K_WAYS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of an expert's weight."""
    offsets, in_range, way = columns
    k = k_first + tl.arange(0, BLOCK_K)
    if N_WAYS > 1:
        base = tl.where(way == 0, bases[0], bases[1])
    elif K_WAYS > 1:
        base = tl.where(k_way == 0, bases[0], bases[1])
    else:
        base = bases[0]
    k_offsets = k_way * strides[1] + k.to(tl.int64) * strides[3]
    pointers = (base + offsets)[None, :] + k_offsets[:, None]
    if EVEN_K:
        tile = tl.load(pointers, mask=in_range[None, :], other=0.0)
    else:
        tile = tl.load(pointers, mask=in_range[None, :] & (k < k_size)[:, None], other=0.0)
    return tile


@triton.jit
def as_multiple(number, UNIT: tl.constexpr):
    """A multiple of UNIT, which the compiler then knows to be one: by itself it only asks for multiples of 16."""
    if UNIT == 1:
        result = number
    else:
        result = number // UNIT * UNIT
    return result


@triton.jit
def weight_strides(stride_e, stride_way, stride_n, stride_k, N_MAJOR: tl.constexpr, UNIT: tl.constexpr):
    """Multiples of UNIT, but for the one that is 1. UNIT also divides n, k and the stride of x."""
    if N_MAJOR:
        stride_k = as_multiple(stride_k, UNIT)
    else:
        stride_n = as_multiple(stride_n, UNIT)
    return as_multiple(stride_e, UNIT), as_multiple(stride_way, UNIT), stride_n, stride_k


@triton.jit
def rounded_operand(tile, PRECISION: tl.constexpr):
    """An operand of a dot in TF32, rounded to nearest as PyTorch's products do: the tensor cores would cut it off."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        nearest = (tile.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, nearest, float("nan"))
    return tile


@triton.jit
def multiply_tile(
    left,
    right,
    k_size,
    DTYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    X_TMA: tl.constexpr,
    N_MAJOR: tl.constexpr,
    N_WAYS: tl.constexpr,
    K_WAYS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum over ways and k of x[rows, way * k_size + k] * weight[expert, way, first_column + column, k], in fp32.

    left = (x, rows, first_row, stride): rows (int64) are read unless X_TMA, where the tile is BLOCK_M rows from
    first_row on. right = (weight, expert, first_column, n_size, strides, experts_per_way, distances_ptr), with the
    strides of an expert, a way, n and k.
    """
    _, _, first_column, n_size, strides, _, _ = right
    way, column = column_split(BLOCK_N, N_WAYS)
    n = first_column + column
    in_range = n < n_size
    k_tiles = tl.cdiv(k_size, BLOCK_K)
    columns = (way.to(tl.int64) * strides[1] + n.to(tl.int64) * strides[2], in_range, way)
    experts = _experts_in_weight(right, DTYPE, WEIGHT, N_WAYS, K_WAYS)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(K_WAYS * k_tiles):
        if K_WAYS == 1:
            k_way = 0
            k_first = step * BLOCK_K
        else:
            k_way = step // k_tiles
            k_first = (step - k_way * k_tiles) * BLOCK_K
        x_tile = _load_left(left, k_way, k_first, k_size, X_TMA, EVEN_K, BLOCK_K)
        if WEIGHT == "tma":
            w_tile = _load_by_descriptor(right, experts, k_way, k_first, K_WAYS, N_MAJOR, BLOCK_N, BLOCK_K)
        else:
            w_tile = _load_by_pointer(
                strides, experts, columns, k_way, k_first, k_size, N_WAYS, K_WAYS, EVEN_K, BLOCK_K
            )
        x_tile = rounded_operand(x_tile, PRECISION)
        w_tile = rounded_operand(w_tile, PRECISION)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_tile(
    out, tile, rows, first_row, end_row, first_column, n_size, stride, TMA: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store a tile up to end_row: to rows (int64, of a pointer) or from first_row on (of a ragged descriptor)."""
    if TMA:
        store_rows(out, tile, first_row, end_row, first_column)
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        valid = first_row + tl.arange(0, tile.shape[0]) < end_row
        pointers = out + rows[:, None] * stride + columns[None, :]
        tl.store(pointers, tile.to(out.dtype.element_ty), mask=valid[:, None] & (columns < n_size)[None, :])


@triton.jit
def zero_unrouted_rows(
    out_ptr, order_ptr, offsets_ptr, num_rows, num_columns, stride, num_experts, SCATTER: tl.constexpr
):
    """Write exact zeros to the rows of sentinel slots, shared among all programs."""
    columns = tl.arange(0, 1024)
    first = tl.load(offsets_ptr + num_experts - 1)
    for row in range(first + tl.program_id(0), num_rows, tl.num_programs(0)):
        target = row
        if SCATTER:
            target = tl.load(order_ptr + row)
        for start in range(0, num_columns, 1024):
            pointers = out_ptr + target.to(tl.int64) * stride + start + columns
            tl.store(pointers, tl.zeros([1024], out_ptr.dtype.element_ty), mask=start + columns < num_columns)
