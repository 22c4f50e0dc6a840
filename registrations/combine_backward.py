"""scatter_moe::combine_backward: gradients of combine's rows and router weights.

grad_y = s * grad_out and grad_s = <grad_out, y> are bilinear: their own gradients are combine and combine_backward.
"""

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define(
    "combine_backward(Tensor grad_out, Tensor y, Tensor? topk_weights, Tensor order, Tensor offsets, int top_k, "
    "bool grouped_in, bool need_y, bool need_weights) -> (Tensor grad_y, Tensor grad_topk_weights)"
)
kernels("combine_backward", checks.combine_backward)


@fake("combine_backward", checks.combine_backward)
def combine_backward_fake(
    grad_out: Tensor,
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    grad_y = y.new_empty(order.shape[0], grad_out.shape[1]) if need_y else y.new_empty(0)
    if topk_weights is None:
        return grad_y, y.new_empty(0)
    return grad_y, topk_weights.new_empty(topk_weights.shape if need_weights else 0)


def setup_context(ctx, output, grad_out, y, topk_weights, order, offsets, *options) -> None:
    ctx.top_k, ctx.grouped_in, ctx.need_y, ctx.need_weights = options
    ctx.needs = [tensor is not None and tensor.requires_grad for tensor in (grad_out, y, topk_weights)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, y, topk_weights, order, offsets)


def backward(ctx, grad_grad_y: Tensor | None, grad_grad_weights: Tensor | None):
    grad_out, y, topk_weights, order, offsets = ctx.saved_tensors
    routing = (order, offsets, ctx.top_k, ctx.grouped_in)
    through_y = grad_grad_y is not None and ctx.need_y
    through_weights = grad_grad_weights is not None and ctx.need_weights
    grad_grad_out = grad_of_y = grad_of_weights = None
    if ctx.needs[0] and through_y:
        grad_grad_out = OPS.combine(grad_grad_y, topk_weights, *routing, grad_out.dtype)
    if ctx.needs[0] and through_weights:
        product = OPS.combine(y, grad_grad_weights, *routing, grad_out.dtype)
        grad_grad_out = product if grad_grad_out is None else grad_grad_out + product
    if ctx.needs[1] and through_weights:
        grad_of_y = OPS.combine_backward(grad_out, y, grad_grad_weights, *routing, True, False)[0]
    if ctx.needs[2] and through_y:
        grad_of_weights = OPS.combine_backward(grad_out, grad_grad_y, topk_weights, *routing, False, True)[1]
    return grad_grad_out, grad_of_y, grad_of_weights


autograd("combine_backward", setup_context, backward)


@sharding("combine_backward", 5)
def combine_backward_sharding(
    grad_out: Placed, y: Placed, topk_weights: Placed | None, order: Placed, offsets: Placed, *options
) -> Division:
    _, _, need_y, need_weights = options
    whole = len(y.shape) == 2
    if tokens_are_sharded(order, offsets):
        places, inputs = (0, 0), [0, 0 if whole else REPLICATED, 0, 0, PARTIAL]
    elif grad_out.placement == 1:
        places, inputs = (1, PARTIAL), [1, 1 if whole else REPLICATED, *[REPLICATED] * 3]
    elif need_weights and y.placement == PARTIAL:
        places, inputs = (REPLICATED, PARTIAL), [REPLICATED, PARTIAL, *[REPLICATED] * 3]
    else:
        places, inputs = (REPLICATED, REPLICATED), [REPLICATED] * 5
    results = [place if need else REPLICATED for place, need in zip(places, (need_y, need_weights), strict=True)]
    return results, inputs
