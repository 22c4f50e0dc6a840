"""Grouped GEMM over the rows of each expert and its gradients, on the CPU.

N slots, E experts; `in` and `out` are the widths of the linear layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.routing import expand_backward, slot_rows, token_rows, zero_sentinels
from scatter_ops.cpu.stacked import stacked_grads
from scatter_ops.grouping import Groups, experts, select_experts

Operands = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def parallel_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    rows = x if grouped_in else token_rows(x, order_N, top_k)
    y = grouped_linear(rows, weight, Groups.read(offsets_E, rows.shape[0]), bias, transposed)
    return y if grouped_out else y.index_select(0, slot_rows(order_N))


def parallel_linear_weight_grad(
    x: Tensor,
    grad: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool = False,
) -> Tensor:
    rows = x if grouped_in else token_rows(x, order_N, top_k)
    grad_rows = grad if grouped_out else grad.index_select(0, order_N)
    return grouped_weight_grad(rows, grad_rows, Groups.read(offsets_E, rows.shape[0]), transposed)


def parallel_linear_bias_grad(grad: Tensor, order_N: Tensor, offsets_E: Tensor, grouped_out: bool) -> Tensor:
    return expand_backward(grad if grouped_out else grad.index_select(0, order_N), offsets_E)


def grouped_linear(
    rows: Tensor,
    weight: Sequence[Tensor],
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """rows W_e^T + b_e for the grouped rows of each expert e, zero for sentinels.

    Written to `out` if it is given, or added to `add_to`, a result of this function that is overwritten.
    """
    y = add_to if out is None else out
    if y is None:
        y = rows.new_empty(rows.shape[0], weight[0].shape[-1 if transposed else -2])
    if _calls_outweigh_copies(weight, groups):
        x_parts, matrices, addends, y_parts = _row_operands(rows, weight, groups, bias, transposed, y)
        product, add_product = torch.bmm, torch.baddbmm
    else:
        x_parts, matrices, addends, y_parts = _expert_operands(rows, weight, groups, bias, transposed, y)
        product, add_product = torch.mm, torch.addmm
    if add_to is not None:
        addends = y_parts
    if addends:
        for addend, x_part, matrix, y_part in zip(addends, x_parts, matrices, y_parts, strict=False):
            add_product(addend, x_part, matrix, out=y_part)
    else:
        for x_part, matrix, y_part in zip(x_parts, matrices, y_parts, strict=False):
            product(x_part, matrix, out=y_part)
    return zero_sentinels(y, groups.num_valid)


def _expert_operands(
    rows: Tensor, weight: Sequence[Tensor], groups: Groups, bias: Sequence[Tensor], transposed: bool, y: Tensor
) -> Operands:
    """Rows of x, matrix, bias and rows of y for the product of each expert."""
    weights, biases = experts(weight, 2), experts(bias, 1)
    if isinstance(weights, Tensor):
        stack = weights if transposed else weights.mT
        matrices = [stack[e] for e in groups.experts]
    else:
        matrices = [weights[e] if transposed else weights[e].t() for e in groups.experts]
    addends = [biases[e] for e in groups.experts] if bias else []
    return groups.split(rows), matrices, addends, groups.split(y)


def _row_operands(
    rows: Tensor, weight: Sequence[Tensor], groups: Groups, bias: Sequence[Tensor], transposed: bool, y: Tensor
) -> Operands:
    """The same for one batched product of all rows, each with a copy of its expert's matrix."""
    matrices = select_experts(weight, 2, groups)
    addends = [select_experts(bias, 1, groups).unsqueeze(1)] if bias else []
    x_rows, y_rows = rows[: groups.num_valid].unsqueeze(1), y[: groups.num_valid].unsqueeze(1)
    return [x_rows], [matrices if transposed else matrices.mT], addends, [y_rows]


def _calls_outweigh_copies(weight: Sequence[Tensor], groups: Groups) -> bool:
    """Whether a product for each expert takes longer than a copy of its matrix for each row and one batched product.

    The limits are where both take about as long; a call in low precision takes several times longer than in float32.
    """
    num_hit, (rows, columns) = len(groups.experts), weight[0].shape[-2:]
    limit = 2**17 if weight[0].itemsize == 2 else 2**12
    return num_hit > 1 and groups.num_valid * rows * columns <= num_hit * limit


def grouped_weight_grad(
    rows: Tensor, grad_rows: Tensor, groups: Groups, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """Stacked sums over each expert's grouped rows of grad^T x, of x^T grad if transposed.

    If `out` is given they are written to it, and the other experts' are left alone.
    """
    left, right = (rows, grad_rows) if transposed else (grad_rows, rows)
    if out is None:
        out = stacked_grads((groups.num_experts, left.shape[1], right.shape[1]), rows, groups)
    for e, left_rows, right_rows in zip(groups.experts, groups.split(left), groups.split(right), strict=False):
        torch.mm(left_rows.t(), right_rows, out=out[e])
    return out
