"""dispatch, combine, expand and their gradients. T tokens, K experts per token, N = T * K slots, E experts, D width."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cuda.device import on_its_device
from scatter_ops.cuda.dispatch import column_block, dispatch_rows
from scatter_ops.cuda.integers import cdiv, next_power_of_2
from scatter_ops.cuda.operands import Routing, Rows
from scatter_ops.cuda.parameters import expert_bias
from scatter_ops.cuda.recording import launch
from scatter_ops.cuda.routing import inverse_order
from scatter_ops.cuda.weight_grad import grouped_sum
from scatter_ops.kernels.rows import combine_backward_kernel, combine_kernel, expand_kernel


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def dispatch(x: Tensor, order_N: Tensor, offsets_E: Tensor, top_k: int) -> Tensor:
    """[N, D] grouped: row i is x[order[i] // top_k], zero from offsets[-1] on."""
    return dispatch_rows(x, Routing(order_N, offsets_E), top_k, zero_unrouted=True)


@on_its_device
def combine(
    y: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[T, D]: the sum over each token's slots of topk_weights times y."""
    inverse_N = inverse_order(order_N, offsets_E) if grouped_in and order_N.numel() else order_N
    return combine_rows(y, topk_weights_TK, inverse_N, top_k, grouped_in, out_dtype or y.dtype)


def combine_rows(
    y: Tensor, topk_weights_TK: Tensor | None, inverse_N: Tensor, top_k: int, grouped_in: bool, out_dtype: torch.dtype
) -> Tensor:
    """combine with the inverse of order at hand; inverse_N isn't read unless grouped_in."""
    y = _unit_stride(y)
    out_TD = torch.empty(y.shape[0] // top_k, y.shape[1], dtype=out_dtype, device=y.device)
    weights = None if topk_weights_TK is None else topk_weights_TK.contiguous()
    combine_into(out_TD, y, weights, inverse_N, grouped_in)
    return out_TD


def combine_into(
    out_TD: Tensor, y: Tensor, topk_weights_TK: Tensor | None, inverse_N: Tensor, grouped_in: bool
) -> None:
    """combine_rows of dense tensors, without allocations."""
    if out_TD.numel():
        num_tokens, num_columns = out_TD.shape
        top_k, block = y.shape[0] // num_tokens, column_block(num_columns)
        grid = num_tokens, cdiv(num_columns, block)
        launch(
            combine_kernel,
            grid,
            y,
            topk_weights_TK,
            inverse_N,
            out_TD,
            num_columns,
            y.stride(0),
            top_k,
            grouped_in,
            block,
        )


@on_its_device
def combine_backward(
    grad_out_TD: Tensor,
    y: Tensor,
    topk_weights_TK: Tensor | None,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of y (in y's row order and dtype) and of topk_weights; one that isn't needed has shape [0]."""
    grad_out, y = _unit_stride(grad_out_TD), _unit_stride(y)
    num_slots, num_columns = order_N.numel(), grad_out.shape[1]
    weights = None if topk_weights_TK is None else topk_weights_TK.contiguous()
    grad_y = y.new_empty((num_slots, num_columns) if need_y else 0)
    grad_weights = y.new_empty(0)
    if need_weights:
        assert weights is not None
        grad_weights = torch.empty_like(weights)
    if num_slots and (need_y or need_weights):
        inverse_N = inverse_order(order_N, offsets_E) if grouped_in else order_N
        combine_backward_kernel[(num_slots,)](
            grad_out,
            y,
            weights,
            inverse_N,
            grad_y if need_y else None,
            grad_weights if need_weights else None,
            num_columns,
            grad_out.stride(0),
            y.stride(0),
            top_k,
            grouped_in,
            column_block(num_columns),
        )
    return grad_y, grad_weights


@on_its_device
def expand(param: Sequence[Tensor], offsets_E: Tensor, num_rows: int, out_dtype: torch.dtype | None = None) -> Tensor:
    """Each expert's parameter repeated for its grouped rows; zero from offsets[-1] on."""
    stacked = len(param) == 1
    rest = param[0].shape[1:] if stacked else param[0].shape
    out = torch.empty(num_rows, *rest, dtype=param[0].dtype, device=param[0].device)
    if out.numel() == 0:
        return out.to(out_dtype or out.dtype)
    num_columns = math.prod(rest)
    flat = expert_bias([p.reshape(-1, num_columns) if stacked else p.flatten() for p in param])
    num_experts = offsets_E.numel()
    expand_kernel[(num_rows,)](
        flat.data,
        out,
        offsets_E,
        num_columns,
        flat.stride_e,
        num_experts,
        next_power_of_2(num_experts),
        flat.kind == "list",
        column_block(num_columns),
    )
    return out.to(out_dtype or out.dtype)


@on_its_device
def expand_backward(grad: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum of each expert's grouped rows: [num_rows, *rest] -> [E, *rest]."""
    rows = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))
    return grouped_sum(Rows(rows, 0), None, Routing(offsets_E, offsets_E), grad.dtype).view(-1, *grad.shape[1:])
