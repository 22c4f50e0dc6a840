"""Grouped GEMM over the rows of each expert and its gradients, on the CPU.

N slots, E experts; `in` and `out` are the widths of the linear layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.routing import expand_backward, slot_rows, zero_experts_but
from scatter_ops.grouping import experts, segments


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
    y = grouped_linear(rows, weight, offsets_E, bias, transposed)
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
    return grouped_weight_grad(rows, grad_rows, offsets_E, transposed)


def parallel_linear_bias_grad(grad: Tensor, order_N: Tensor, offsets_E: Tensor, grouped_out: bool) -> Tensor:
    return expand_backward(grad if grouped_out else grad.index_select(0, order_N), offsets_E)


def grouped_linear(
    rows: Tensor,
    weight: Sequence[Tensor],
    offsets_E: Tensor,
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
    end = 0
    for e, start, end in segments(offsets_E):
        matrix = weights[e] if transposed else weights[e].t()
        y_rows = y[start:end]
        addend = y_rows if add_to is not None else biases[e] if bias else None
        if addend is None:
            torch.mm(rows[start:end], matrix, out=y_rows)
        else:
            torch.addmm(addend, rows[start:end], matrix, out=y_rows)
    if end < y.shape[0]:
        y[end:].zero_()
    return y


def grouped_weight_grad(rows: Tensor, grad_rows: Tensor, offsets_E: Tensor, transposed: bool) -> Tensor:
    """Stacked sums over each expert's grouped rows of grad^T x, of x^T grad if transposed."""
    left, right = (rows, grad_rows) if transposed else (grad_rows, rows)
    stacked, hit = rows.new_empty(offsets_E.numel(), left.shape[1], right.shape[1]), []
    for e, start, end in segments(offsets_E):
        torch.mm(left[start:end].t(), right[start:end], out=stacked[e])
        hit.append(e)
    return zero_experts_but(hit, stacked)
