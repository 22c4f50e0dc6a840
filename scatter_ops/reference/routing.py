"""Routing and the operators that move rows between tokens, slots and experts.

T tokens, K experts per token, N = T * K slots, E experts, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.grouping import accumulation_dtype, segments


def route(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the slots by expert. Returns order [N] and offsets [E] (cumulative ends), both int32.

    An expert's slots come by token, as on CUDA. The CPU has them choice by choice, and those of a choice by token.
    """
    ids_N = topk_ids_TK.reshape(-1)
    is_expert_N = (ids_N >= 0) & (ids_N < num_experts)
    keys_N = torch.where(is_expert_N, ids_N, num_experts)
    order_N = keys_N.argsort(stable=True)
    offsets_E = torch.bincount(keys_N, minlength=num_experts + 1)[:num_experts].cumsum(0)
    return order_N.int(), offsets_E.int()


def dispatch(x_TD: Tensor, order_N: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    """Grouped row i is x[order[i] // top_k]; rows of sentinels are zero."""
    y_ND = x_TD[order_N.long() // top_k]
    y_ND[int(offsets_E[-1]) :] = 0
    return y_ND


def combine(
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out[t] = sum over k of topk_weights[t, k] * y(slot t * K + k). Returns [T, D]; weights of None are ones."""
    rows_ND = y_ND.to(accumulation_dtype(y_ND.dtype))
    if topk_weights_TK is not None:
        rows_ND = rows_ND * slot_weights(topk_weights_TK, order_N, grouped_in).to(rows_ND.dtype)
    rows_ND = slot_order(rows_ND, order_N, offsets_E) if grouped_in else rows_ND
    return rows_ND.unflatten(0, (-1, top_k)).sum(1).to(out_dtype or y_ND.dtype)


def combine_backward(
    grad_out_TD: Tensor,
    y_ND: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of y (in y's row order) and of topk_weights; one that isn't needed has shape [0].

    y is read for its dtype, and for its values only if need_weights.
    """
    dtype = accumulation_dtype(y_ND.dtype)
    grad_ND = grad_out_TD.to(dtype).repeat_interleave(top_k, dim=0)
    grad_ND = dispatch(grad_ND, order_N, offsets_E, 1) if grouped_in else grad_ND
    grad_y, grad_weights = y_ND.new_empty(0), y_ND.new_empty(0)
    if need_weights:
        assert topk_weights_TK is not None
        grad_N = (grad_ND * y_ND.to(dtype)).sum(-1)
        grad_N = slot_order(grad_N, order_N, offsets_E) if grouped_in else grad_N
        grad_weights = grad_N.view_as(topk_weights_TK).to(topk_weights_TK.dtype)
    if need_y:
        if topk_weights_TK is not None:
            grad_ND = grad_ND * slot_weights(topk_weights_TK, order_N, grouped_in).to(dtype)
        grad_y = grad_ND.to(y_ND.dtype)
        grad_y[int(offsets_E[-1]) if grouped_in else len(grad_y) :] = 0
    return grad_y, grad_weights


def expand(param: Sequence[Tensor], offsets_E: Tensor, num_rows: int, out_dtype: torch.dtype | None = None) -> Tensor:
    """Each expert's parameter repeated for its grouped rows; rows past the last expert's are zero.

    param: one tensor is always stacked, [E, *rest]; several are one tensor [*rest] per expert.
    out_dtype: that of the rows, param's if None. Gradients are summed in it and rounded once to param's.
    """
    per_expert = param[0] if len(param) == 1 else param
    y = per_expert[0].new_zeros(num_rows, *per_expert[0].shape, dtype=out_dtype)
    for e, start, end in segments(offsets_E):
        y[start:end] = per_expert[e]
    return y


def expand_backward(grad: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum of each expert's grouped rows: [num_rows, *rest] -> [E, *rest]; zero for an expert without tokens."""
    dtype = accumulation_dtype(grad.dtype)
    sums = grad.new_zeros(offsets_E.numel(), *grad.shape[1:])
    for e, start, end in segments(offsets_E):
        sums[e] = grad[start:end].to(dtype).sum(0).to(grad.dtype)
    return sums


def slot_order(rows: Tensor, order_N: Tensor, offsets_E: Tensor) -> Tensor:
    """Grouped rows in slot order. Those of sentinels are replaced by zeros, whatever they hold."""
    num_valid = int(offsets_E[-1])
    y = torch.zeros_like(rows)
    y[order_N[:num_valid].long()] = rows[:num_valid]
    return y


def slot_weights(topk_weights_TK: Tensor, order_N: Tensor, grouped: bool) -> Tensor:
    """The router weight of each row, [N, 1]."""
    weights_N1 = topk_weights_TK.reshape(-1, 1)
    return weights_N1[order_N.long()] if grouped else weights_N1
