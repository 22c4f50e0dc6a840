"""Arguments of routing and of the operators that move rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.checks import tensors

MAX_SLOTS = 2**31 - 1


def route(topk_ids: Tensor, num_experts: int) -> None:
    tensors.dims("topk_ids", topk_ids, 2)
    tensors.dtype_in("topk_ids", topk_ids, tensors.ID_DTYPES)
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, accepted is at least 1")
    torch._check_value(
        topk_ids.numel() <= MAX_SLOTS,
        lambda: f"topk_ids: got {topk_ids.numel()} slots, accepted are at most {MAX_SLOTS} (order is int32)",
    )


def dispatch(x: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> None:
    tensors.rows_of_tokens("x", x, order, top_k)
    tensors.routing(x, order, offsets)


def combine(
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> None:
    tensors.rows_of_slots("y", y, order)
    tensors.divides_slots(order, top_k)
    tensors.routing(y, order, offsets)
    tensors.router_weights(topk_weights, y, order, top_k)
    tensors.output_dtype(out_dtype)


def combine_backward(
    grad_out: Tensor,
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> None:
    tensors.rows_of_tokens("grad_out", grad_out, order, top_k)
    tensors.routing(grad_out, order, offsets)
    tensors.router_weights(topk_weights, grad_out, order, top_k)
    tensors.dtype_in("y", y, tensors.FLOAT_DTYPES)
    if need_weights and topk_weights is None:
        raise ValueError("need_weights: got True, accepted is False where topk_weights is None")
    if need_weights:
        tensors.rows_of_slots("y", y, order)
        tensors.same_size("y", "columns", y.shape[1], grad_out.shape[1], "the columns of grad_out")


def expand(param: Sequence[Tensor], offsets: Tensor, num_rows: int, out_dtype: torch.dtype | None = None) -> None:
    if not param:
        raise ValueError("param: got an empty list, accepted is one tensor [E, *rest] or one tensor [*rest] per expert")
    first = param[0]
    if first.dim() == 0 and len(param) == 1:
        raise ValueError("param: got one tensor without dimensions, accepted is one tensor [E, *rest]")
    tensors.offsets_of(first, offsets)
    tensors.alike("param", param, first)
    given = first.shape[0] if len(param) == 1 else len(param)
    tensors.same_size("param", "experts", given, offsets.shape[0], "the length of offsets")
    tensors.output_dtype(out_dtype)


def expand_backward(grad: Tensor, offsets: Tensor) -> None:
    tensors.dtype_in("grad", grad, tensors.FLOAT_DTYPES)
    if grad.dim() == 0:
        raise ValueError("grad: got a tensor without dimensions, accepted is [num_rows, *rest]")
    tensors.offsets_of(grad, offsets)
