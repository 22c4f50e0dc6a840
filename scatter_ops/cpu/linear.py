"""Grouped GEMM over the rows of each expert and its gradients, on the CPU.

N slots, E experts; `in` and `out` are the widths of the linear layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.routing import expand_backward, slot_rows, zero_experts_but
from scatter_ops.grouping import Groups, experts


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
    rows = x if grouped_in else x.index_select(0, order_N if top_k == 1 else order_N // top_k)
    y = grouped_linear(rows, weight, Groups.of(offsets_E, rows.shape[0]), bias, transposed)
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
    rows = x if grouped_in else x.index_select(0, order_N if top_k == 1 else order_N // top_k)
    grad_rows = grad if grouped_out else grad.index_select(0, order_N)
    return grouped_weight_grad(rows, grad_rows, Groups.of(offsets_E, rows.shape[0]), offsets_E.numel(), transposed)


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
    weights, biases = experts(weight, 2), experts(bias, 1)
    y = add_to if out is None else out
    if y is None:
        y = rows.new_empty(rows.shape[0], weight[0].shape[-1 if transposed else -2])
    *y_groups, sentinels = y.split_with_sizes(groups.sizes)
    for e, x_rows, y_rows in zip(groups.experts, rows.split_with_sizes(groups.sizes), y_groups, strict=False):
        matrix = weights[e] if transposed else weights[e].t()
        if add_to is not None:
            torch.addmm(y_rows, x_rows, matrix, out=y_rows)
        elif bias:
            torch.addmm(biases[e], x_rows, matrix, out=y_rows)
        else:
            torch.mm(x_rows, matrix, out=y_rows)
    sentinels.zero_()
    return y


def grouped_weight_grad(rows: Tensor, grad_rows: Tensor, groups: Groups, num_experts: int, transposed: bool) -> Tensor:
    """Stacked sums over each expert's grouped rows of grad^T x, of x^T grad if transposed."""
    left, right = (rows, grad_rows) if transposed else (grad_rows, rows)
    stacked = rows.new_empty(num_experts, left.shape[1], right.shape[1])
    pairs = zip(left.t().split_with_sizes(groups.sizes, 1), right.split_with_sizes(groups.sizes), strict=True)
    for e, (left_columns, right_rows) in zip(groups.experts, pairs, strict=False):
        torch.mm(left_columns, right_rows, out=stacked[e])
    return zero_experts_but(groups.experts, stacked)
