"""scatter_moe::combine: the weighted sum over each token's experts."""

import torch
from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define(
    "combine(Tensor y, Tensor? topk_weights, Tensor order, Tensor offsets, int top_k, bool grouped_in, "
    "ScalarType? out_dtype=None) -> Tensor"
)
kernels("combine", checks.combine)


@fake("combine", checks.combine)
def combine_fake(
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return y.new_empty(order.shape[0] // top_k, y.shape[1], dtype=out_dtype or y.dtype)


def setup_context(ctx, output, y, topk_weights, order, offsets, top_k, grouped_in, out_dtype=None) -> None:
    ctx.top_k, ctx.grouped_in, ctx.y_dtype = top_k, grouped_in, y.dtype
    ctx.needs = y.requires_grad, topk_weights is not None and topk_weights.requires_grad
    ctx.save_for_backward(y if ctx.needs[1] else None, topk_weights, order, offsets)


def backward(ctx, grad_out: Tensor):
    y, topk_weights, order, offsets = ctx.saved_tensors
    need_y, need_weights = ctx.needs
    if y is None:
        y = grad_out.new_empty(0, dtype=ctx.y_dtype)
    grad_y, grad_weights = OPS.combine_backward(
        grad_out, y, topk_weights, order, offsets, ctx.top_k, ctx.grouped_in, need_y, need_weights
    )
    return grad_y if need_y else None, grad_weights if need_weights else None


autograd("combine", setup_context, backward)


@sharding("combine", 4)
def combine_sharding(y: Placed, topk_weights: Placed | None, order: Placed, offsets: Placed, *options) -> Division:
    """Partial sums stay partial, since there are fewer tokens than slots to add up."""
    if tokens_are_sharded(order, offsets):
        return [0], [0, 0, 0, PARTIAL]
    place = y.placement if y.placement in (1, PARTIAL) else REPLICATED
    return [place], [place, REPLICATED, REPLICATED, REPLICATED]
