"""Two ways of multiplying grouped rows with their experts' matrices on the CPU, and which takes less time.

Both write W_e x + b_e to the rows of y, or add W_e x to them, for the rows that have an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.grouping import Groups, experts, int32_tensor

CALL_ELEMENTS = 2**12  # of a matrix, that are copied and read again in the time of one call of a product
CALL_ELEMENTS_IN_HALF_PRECISION = 2**17  # there such a call takes several times longer


def by_expert(
    rows: Tensor,
    weight: Sequence[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
    y: Tensor,
    add: bool,
) -> None:
    """One product for each expert with rows, its matrix read where it is."""
    weights = experts(weight, 2)
    if isinstance(weights, Tensor):
        stack = weights if transposed else weights.mT
        matrices = [stack[e] for e in groups.experts]
    else:
        matrices = [weights[e] if transposed else weights[e].t() for e in groups.experts]
    x_parts, y_parts = groups.split(rows), groups.split(y)
    if not bias and not add:
        for x_part, matrix, y_part in zip(x_parts, matrices, y_parts, strict=False):
            torch.mm(x_part, matrix, out=y_part)
        return
    biases = experts(bias, 1)
    addends = y_parts if add else [biases[e] for e in groups.experts]
    for addend, x_part, matrix, y_part in zip(addends, x_parts, matrices, y_parts, strict=False):
        torch.addmm(addend, x_part, matrix, out=y_part)


def by_row(
    rows: Tensor,
    weight: Sequence[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
    y: Tensor,
    add: bool,
) -> None:
    """One batched product of all rows, each with a copy of its expert's matrix."""
    num_rows, row_experts = groups.num_valid, groups.row_experts()
    matrices = _select(weight, 2, row_experts)
    matrices = matrices if transposed else matrices.mT
    x_N1D, y_N1F = rows[:num_rows].unsqueeze(1).expand(num_rows, 1, -1), y[:num_rows].unsqueeze(1)
    if not bias and not add:
        torch.bmm(x_N1D, matrices, out=y_N1F)
    else:
        addend = y_N1F if add else _select(bias, 1, row_experts).unsqueeze(1)
        torch.baddbmm(addend, x_N1D, matrices, out=y_N1F)


def calls_outweigh_copies(weight: Sequence[Tensor], groups: Groups) -> bool:
    """Whether `by_row` takes less time: the limits are where both take about as long."""
    num_hit, (rows, columns) = len(groups.experts), weight[0].shape[-2:]
    call = CALL_ELEMENTS_IN_HALF_PRECISION if weight[0].itemsize == 2 else CALL_ELEMENTS
    return num_hit > 1 and groups.num_valid * rows * columns <= num_hit * call


def _select(parameters: Sequence[Tensor], expert_dim: int, row_experts: list[int]) -> Tensor:
    """A copy of its expert's parameter for each row."""
    per_expert = experts(parameters, expert_dim)
    if isinstance(per_expert, Tensor):
        return per_expert.index_select(0, int32_tensor(row_experts))
    return torch.stack([per_expert[e] for e in row_experts])
