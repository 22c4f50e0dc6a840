"""Grouped GEMM over the rows of each expert and its gradients, on the CPU.

N slots, E experts; `in` and `out` are the widths of the linear layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scatter_ops.cpu.multiply import multiplier
from scatter_ops.cpu.products import grouped_mm_serves, product
from scatter_ops.cpu.routing import expand_backward, slot_rows, token_rows, zero_sentinels
from scatter_ops.cpu.stacked import stacked_grads
from scatter_ops.grouping import Groups


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
    y = grouped_linear(rows, weight, Groups.read(offsets_E, order_N.numel()), bias, transposed)
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
    return grouped_weight_grad(rows, grad_rows, Groups.read(offsets_E, order_N.numel()), transposed)


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
    scale: float = 1.0,
) -> Tensor:
    """rows W_e^T + b_e for the grouped rows (or the one row that all are) of each expert e, zero for sentinels.

    Written to `out` if it is given, or `scale` times added to `add_to`, a result of this function that is overwritten.
    """
    y = product(rows, weight, groups, bias, transposed, add_to if out is None else out, add_to is not None, scale)
    return zero_sentinels(y, groups.num_valid)


def grouped_weight_grad(
    rows: Tensor, grad_rows: Tensor, groups: Groups, transposed: bool, out: Tensor | None = None
) -> Tensor:
    """Stacked sums over each expert's grouped rows of grad^T x, of x^T grad if transposed.

    If `out` is given they are written to it, and the other experts' are left alone.
    """
    left, right = (rows, grad_rows) if transposed else (grad_rows, rows)
    every_row = left.shape[0] == right.shape[0]  # and not one that stands for all
    if out is None and every_row and grouped_mm_serves(groups, left, right):
        return F.grouped_mm(left.t(), right, offs=groups.offsets_E)
    if out is None:
        out = stacked_grads((groups.num_experts, left.shape[1], right.shape[1]), rows, groups)
    multiply = multiplier(rows.dtype)
    for e, left_rows, right_rows in zip(groups.experts, groups.split(left), groups.split(right), strict=False):
        if left_rows.shape[0] == 1:
            torch.mul(left_rows.t(), right_rows, out=out[e])  # the product of one row is elementwise
        else:
            multiply(None, left_rows.t(), right_rows, 1.0, out[e])
    return out
