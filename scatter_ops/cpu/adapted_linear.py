"""Grouped GEMM with low-rank adapters on the CPU: by thin products, or with each expert's sum made for its own rows.

An expert's sum is made in memory that the next expert's takes again, so a sum of all experts never exists. It is what
PyTorch makes of W + scale L R, to the bit, and so are gradients through the gradient of such a sum.

N slots, E experts, P and Q the sizes of an expert's matrix, r the rank of what is added to it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.linear import grouped_linear, grouped_weight_grad
from scatter_ops.cpu.products import by_expert
from scatter_ops.cpu.routing import slot_rows, token_rows, zero_sentinels
from scatter_ops.cpu.stacked import stacked_grads
from scatter_ops.grouping import Groups

FEW_COLUMNS = 32  # a product with fewer takes the time of one with as many


def adapted_linear_forward(
    x: Tensor,
    weight_EPQ: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    rows = x if grouped_in else token_rows(x, order_N, top_k)
    groups = Groups.read(offsets_E, order_N.numel())
    lhs_EPr, rhs_ErQ = lhs_EPr.contiguous(), rhs_ErQ.contiguous()  # small copies of what may be strided views
    num_in, num_out = x.shape[1], weight_EPQ.shape[2 if transposed else 1]
    linear = _by_sums if _sums_take_less(num_in, num_out, groups) else _by_thin_products
    y = linear(rows, weight_EPQ, lhs_EPr, rhs_ErQ, scale, groups, bias, transposed)
    return y if grouped_out else y.index_select(0, slot_rows(order_N))


def adapted_linear_grads(
    x: Tensor,
    grad: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor]:
    rows = x if grouped_in else token_rows(x, order_N, top_k)
    grad_rows = grad if grouped_out else grad.index_select(0, order_N)
    groups = Groups.read(offsets_E, order_N.numel())
    lhs_EPr, rhs_ErQ = lhs_EPr.contiguous(), rhs_ErQ.contiguous()
    take_whole = _whole_grads_take_less(x.shape[1], grad.shape[1], lhs_EPr.shape[2], groups)
    grads = _through_whole_grads if take_whole else _through_thin_products
    grad_lhs, grad_rhs = grads(rows, grad_rows, lhs_EPr, rhs_ErQ, groups, transposed, need_lhs, need_rhs)
    return grad_lhs.mul_(scale), grad_rhs.mul_(scale)


def _sums_take_less(num_in: int, num_out: int, groups: Groups) -> bool:
    """Whether making the sums takes no more operations than thin products: of either r for each of these."""
    return len(groups.experts) * num_in * num_out <= groups.num_valid * (num_in + num_out)


def _whole_grads_take_less(num_in: int, num_out: int, rank: int, groups: Groups) -> bool:
    """Whether each expert's whole gradient, then multiplied by both factors, takes no more time than thin products."""
    whole = (groups.num_valid + 2 * rank * len(groups.experts)) * num_in * num_out
    return whole <= 2 * max(rank, FEW_COLUMNS) * groups.num_valid * (num_in + num_out)


def _by_sums(
    rows: Tensor,
    weight_EPQ: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    scale: float,
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    def matrices() -> Iterator[Tensor]:
        total = weight_EPQ.new_empty(weight_EPQ.shape[1:])
        for e in groups.experts:
            torch.addmm(weight_EPQ[e], lhs_EPr[e], rhs_ErQ[e], alpha=scale, out=total)
            yield total if transposed else total.t()

    y = rows.new_empty(groups.num_rows, weight_EPQ.shape[2 if transposed else 1])
    return zero_sentinels(by_expert(rows, matrices(), groups, bias, y), groups.num_valid)


def _by_thin_products(
    rows: Tensor,
    weight_EPQ: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    scale: float,
    groups: Groups,
    bias: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    first, second = (lhs_EPr, rhs_ErQ) if transposed else (rhs_ErQ, lhs_EPr)
    y = grouped_linear(rows, [weight_EPQ], groups, bias, transposed)
    thin_Nr = grouped_linear(rows, [first], groups, [], transposed)
    return grouped_linear(thin_Nr, [second], groups, [], transposed, add_to=y, scale=scale)


def _through_whole_grads(
    rows: Tensor,
    grad_rows: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    groups: Groups,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor]:
    left, right = (rows, grad_rows) if transposed else (grad_rows, rows)
    grad_lhs = stacked_grads(lhs_EPr.shape, rows, groups) if need_lhs else rows.new_empty(0)
    grad_rhs = stacked_grads(rhs_ErQ.shape, rows, groups) if need_rhs else rows.new_empty(0)
    total = rows.new_empty(left.shape[1], right.shape[1])
    for e, left_rows, right_rows in zip(groups.experts, groups.split(left), groups.split(right), strict=False):
        torch.mm(left_rows.t(), right_rows, out=total)
        if need_lhs:
            torch.mm(total, rhs_ErQ[e].t(), out=grad_lhs[e])
        if need_rhs:
            torch.mm(lhs_EPr[e].t(), total, out=grad_rhs[e])
    return grad_lhs, grad_rhs


def _through_thin_products(
    rows: Tensor,
    grad_rows: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    groups: Groups,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor]:
    first, second = (lhs_EPr, rhs_ErQ) if transposed else (rhs_ErQ, lhs_EPr)
    need_first, need_second = (need_lhs, need_rhs) if transposed else (need_rhs, need_lhs)
    grad_first = grad_second = rows.new_empty(0)
    if need_second:
        thin_Nr = grouped_linear(rows, [first], groups, [], transposed)
        grad_second = grouped_weight_grad(thin_Nr, grad_rows, groups, transposed)
    if need_first:
        thin_Nr = grouped_linear(grad_rows, [second], groups, [], not transposed)
        grad_first = grouped_weight_grad(rows, thin_Nr, groups, transposed)
    return (grad_first, grad_second) if transposed else (grad_second, grad_first)
