"""The launch that copies rows into grouped order, for dispatch and for GEMMs that would rather not gather."""

import torch
from torch import Tensor

from scatter_ops.cuda.integers import cdiv, next_power_of_2
from scatter_ops.cuda.operands import Routing, Rows
from scatter_ops.cuda.recording import launch
from scatter_ops.kernels.rows import dispatch_kernel

MAX_BLOCK = 1024


def column_block(num_columns: int) -> int:
    """Columns that a program which walks a row takes at a time."""
    return min(MAX_BLOCK, max(16, next_power_of_2(num_columns)))


def dispatch_rows(x: Tensor, routing: Routing, divisor: int, zero_unrouted: bool) -> Tensor:
    """[N, columns]: row i is x[order[i] // divisor]; from offsets[-1] on zero if zero_unrouted, else undefined."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_columns = x.shape[1]
    assert x.shape[0] * divisor == routing.num_slots, "rows and slots disagree"
    out = torch.empty(routing.num_slots, num_columns, dtype=x.dtype, device=x.device)
    if out.numel():
        block = column_block(num_columns)
        grid = routing.num_slots // divisor, cdiv(num_columns, block)
        inverse_N = routing.inverse_N
        launch(dispatch_kernel, grid, x, out, inverse_N, num_columns, x.stride(0), divisor, zero_unrouted, block)
    return out


def regrouped(rows: Rows, routing: Routing) -> Rows:
    """A grouped copy of gathered rows: one pass over memory that lets products read them by TMA.

    Products clip at the last expert's rows. Where experts are divided among ranks, half of the slots and more may be
    sentinels, whose rows are then not worth writing.
    """
    if rows.divisor == 0:
        return rows
    return Rows(dispatch_rows(rows.data, routing, rows.divisor, zero_unrouted=False), 0)
