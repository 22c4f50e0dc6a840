"""Ways of multiplying grouped rows with their experts' matrices on the CPU, and which takes the least time.

After products of any size Python's own code is out of the caches and a call from it takes several microseconds: the
loop over the experts is left to PyTorch where that can be.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from scatter_ops.cpu.multiply import multiplier, multiplies_slowly
from scatter_ops.grouping import Groups, experts

# Of a matrix, that are copied and read again in the time of one call of a product: longer where oneDNN makes it.
CALL_ELEMENTS = {torch.float64: 2**13, torch.float32: 2**14}
ONEDNN_CALL_ELEMENTS = 2**17
GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, a power of two


def product(
    rows: Tensor,
    weight: Sequence[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
    y: Tensor | None,
    add: bool,
    scale: float,
) -> Tensor:
    """W_e x + b_e, written or `scale` times added to y's rows if given; undefined for rows without an expert."""
    if _calls_outweigh_copies(weight, groups):
        return _by_row(rows, weight, groups, bias, transposed, y, add, scale)
    if groups.num_valid == len(groups.experts) and not bias and not add:
        y = _or_new(y, rows, weight, groups, transposed)
        x_rows = repeat(rows[0]) if rows.shape[0] == 1 else rows.unbind(0)
        return by_vector(x_rows, weight, groups.experts, transposed, y)
    every_row = rows.shape[0] == groups.num_rows  # and not one that stands for all
    if y is None and not bias and len(weight) == 1 and every_row and grouped_mm_serves(groups, rows, weight[0]):
        return F.grouped_mm(rows, weight[0] if transposed else weight[0].mT, offs=groups.offsets_E)
    y = _or_new(y, rows, weight, groups, transposed)
    return by_expert(rows, _in_place(weight, groups.experts, transposed), groups, bias, y, add, scale)


def grouped_mm_serves(groups: Groups, *matrices: Tensor) -> bool:
    """Whether PyTorch's loop takes these matrices, and takes less time: it goes over the experts without rows, too."""
    num_hit = len(groups.experts)
    dtype, most_hit = matrices[0].dtype, num_hit > 1 and 2 * num_hit >= groups.num_experts
    fast = dtype in GROUPED_MM_DTYPES and not multiplies_slowly(dtype)
    return most_hit and fast and all(map(_is_aligned, matrices))


def by_expert(
    rows: Tensor,
    matrices: Iterable[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    y: Tensor,
    add: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """One product for each expert with rows. matrices: [in, out] of each of them, of which one is looked at a time."""
    biases = experts(bias, 1) if bias else []
    y_parts, multiply = groups.split(y), multiplier(rows.dtype)
    addends = y_parts if add else [biases[e] for e in groups.experts] if bias else repeat(None)
    for addend, x_part, matrix, y_part in zip(addends, groups.split(rows), matrices, y_parts, strict=False):
        multiply(addend, x_part, matrix, scale, y_part)
    return y


def by_vector(
    vectors: Iterable[Tensor], weight: Sequence[Tensor], row_experts: list[int], transposed: bool, y: Tensor
) -> Tensor:
    """W_e x of each vector [in] and its expert; written to the first rows of y."""
    matrices = _in_place(weight, row_experts, not transposed)
    for vector, matrix, out in zip(vectors, matrices, y.unbind(0), strict=False):
        torch.mv(matrix, vector, out=out)
    return y


def _in_place(weight: Sequence[Tensor], numbers: list[int], transposed: bool) -> list[Tensor]:
    """[in, out] of each expert by its number, where it is."""
    weights = experts(weight, 2)
    if isinstance(weights, Tensor):
        stack = weights if transposed else weights.mT
        return [stack[e] for e in numbers]
    return [weights[e] if transposed else weights[e].t() for e in numbers]


def _by_row(
    rows: Tensor,
    weight: Sequence[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
    y: Tensor | None,
    add: bool,
    scale: float,
) -> Tensor:
    """One batched product of all rows, each with a copy of its expert's matrix."""
    num_rows, row_experts = groups.num_valid, groups.row_experts()
    matrices = _select(weight, 2, row_experts)
    matrices = matrices if transposed else matrices.mT
    all_valid = num_rows == groups.num_rows
    rows = rows if all_valid else rows[:num_rows]
    x_N1D = rows.expand(num_rows, 1, -1) if rows.shape[0] == 1 else rows.unsqueeze(1)
    if y is None and not bias and all_valid:
        return torch.bmm(x_N1D, matrices).squeeze_(1)  # no view: whoever gets it may write to it
    y = _or_new(y, rows, weight, groups, transposed)
    y_N1F = y[:num_rows].unsqueeze(1)
    if not bias and not add:
        torch.bmm(x_N1D, matrices, out=y_N1F)
    else:
        addend = y_N1F if add else _select(bias, 1, row_experts).unsqueeze(1)
        torch.baddbmm(addend, x_N1D, matrices, alpha=scale, out=y_N1F)
    return y


def _calls_outweigh_copies(weight: Sequence[Tensor], groups: Groups) -> bool:
    """Whether a product by row takes less time than one by expert: the limits are where both take about as long."""
    num_hit, dtype, (rows, columns) = len(groups.experts), weight[0].dtype, weight[0].shape[-2:]
    half_precision = dtype not in CALL_ELEMENTS
    if half_precision and multiplies_slowly(dtype):
        return False
    call_elements = ONEDNN_CALL_ELEMENTS if half_precision else CALL_ELEMENTS[dtype]
    return num_hit > 1 and groups.num_valid * rows * columns <= num_hit * call_elements


def _is_aligned(matrix: Tensor) -> bool:
    """Whether it has dense rows or columns, each of which begins where PyTorch's loop asks for."""
    *_, row, column = matrix.stride()
    *_, num_rows, num_columns = matrix.shape
    if column != 1:
        row, column, num_columns = column, row, num_rows
    starts = row * matrix.itemsize | matrix.data_ptr()
    return column == 1 and row >= num_columns and starts % ALIGNMENT == 0


def _or_new(y: Tensor | None, rows: Tensor, weight: Sequence[Tensor], groups: Groups, transposed: bool) -> Tensor:
    return rows.new_empty(groups.num_rows, weight[0].shape[-1 if transposed else -2]) if y is None else y


def _select(parameters: Sequence[Tensor], expert_dim: int, row_experts: Tensor) -> Tensor:
    """A copy of its expert's parameter for each row."""
    per_expert = experts(parameters, expert_dim)
    if isinstance(per_expert, Tensor):
        return per_expert.index_select(0, row_experts)
    return torch.stack([per_expert[e] for e in row_experts.tolist()])
