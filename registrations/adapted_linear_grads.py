"""scatter_moe::adapted_linear_grads: the gradients of adapted_linear's factors, without one of the weights' size.

With G the gradient of the weights, scale G R^T and scale L^T G: linear in each of x, grad, L and R. Their products with
upstream gradients U and V are those of G with scale (U R + L V), which is low in rank again.
"""

import torch
from torch import Tensor

from registrations.adapted_linear import low_rank_linear
from registrations.adapted_linear_forward import factor_places
from registrations.library import OPS, autograd, define, fake, flops, kernels, requires_grad
from registrations.parallel_linear import summed_by_row
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define(
    "adapted_linear_grads(Tensor x, Tensor grad, Tensor lhs, Tensor rhs, Tensor order, Tensor offsets, float scale, "
    "int top_k, bool grouped_in, bool grouped_out, bool transposed, bool need_lhs, bool need_rhs) "
    "-> (Tensor grad_lhs, Tensor grad_rhs)"
)


def by_thin_products(
    x: Tensor,
    grad: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    order: Tensor,
    offsets: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor]:
    routing, of_x, of_grad = (order, offsets), (top_k, grouped_in, True), (1, grouped_out, True)
    first, second = (lhs, rhs) if transposed else (rhs, lhs)
    need_first, need_second = (need_lhs, need_rhs) if transposed else (need_rhs, need_lhs)
    grad_first = grad_second = x.new_empty(0)
    if need_second:
        thin = OPS.parallel_linear(x, [first.contiguous()], *routing, *of_x, [], transposed)
        grad_second = OPS.parallel_linear_weight_grad(thin, grad, *routing, 1, True, grouped_out, transposed) * scale
    if need_first:
        thin = OPS.parallel_linear(grad, [second.contiguous()], *routing, *of_grad, [], not transposed)
        grad_first = OPS.parallel_linear_weight_grad(x, thin, *routing, *of_x, transposed) * scale
    return (grad_first, grad_second) if transposed else (grad_second, grad_first)


kernels("adapted_linear_grads", checks.adapted_linear_grads, on_cuda=by_thin_products)


@fake("adapted_linear_grads", checks.adapted_linear_grads)
def adapted_linear_grads_fake(x: Tensor, grad: Tensor, lhs: Tensor, rhs: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *_, need_lhs, need_rhs = rest
    return x.new_empty(lhs.shape if need_lhs else 0), x.new_empty(rhs.shape if need_rhs else 0)


def setup_context(ctx, output, x, grad, lhs, rhs, order, offsets, *options) -> None:
    *ctx.options, need_lhs, need_rhs = options
    ctx.outputs_needed = need_lhs, need_rhs
    ctx.needs = [*map(requires_grad, (x, grad, lhs, rhs))]
    ctx.save_for_backward(x, grad, lhs, rhs, order, offsets)


def backward(ctx, upstream_lhs: Tensor, upstream_rhs: Tensor):
    x, grad, lhs, rhs, order, offsets = ctx.saved_tensors
    scale, top_k, grouped_in, grouped_out, transposed = ctx.options
    has_lhs, has_rhs = ctx.outputs_needed
    need_x, need_grad, need_lhs, need_rhs = ctx.needs
    grad_x = grad_grad = grad_lhs = grad_rhs = None
    # scale (U R + L V): an output that was not needed has no upstream gradient
    left = torch.cat([t for t, is_there in ((upstream_lhs, has_lhs), (lhs, has_rhs)) if is_there], 2)
    right = torch.cat([t for t, is_there in ((rhs, has_lhs), (upstream_rhs, has_rhs)) if is_there], 1)

    def input_grad(to_groups: bool) -> Tensor:
        return low_rank_linear(grad, left, right, order, offsets, 1, grouped_out, to_groups, not transposed) * scale

    if need_x:
        grad_x = summed_by_row(input_grad, order, offsets, top_k, grouped_in)
    if need_grad:
        layout = (order, offsets, top_k, grouped_in, grouped_out, transposed)
        grad_grad = low_rank_linear(x, left, right, *layout) * scale
    need_lhs, need_rhs = need_lhs and has_rhs, need_rhs and has_lhs
    if need_lhs or need_rhs:
        factors = (upstream_lhs if has_lhs else lhs, upstream_rhs if has_rhs else rhs)
        grads = OPS.adapted_linear_grads(x, grad, *factors, order, offsets, *ctx.options, need_lhs, need_rhs)
        grad_lhs, grad_rhs = (g if need else None for g, need in zip(grads, (need_lhs, need_rhs), strict=True))
    return grad_x, grad_grad, grad_lhs, grad_rhs


autograd("adapted_linear_grads", setup_context, backward)


@flops("adapted_linear_grads")
def adapted_linear_grads_flops(x_shape, grad_shape, lhs_shape, *args, **kwargs) -> int:
    """2 * N * r * (in + out) for each factor, those of thin products; an upper bound, since sentinels cost nothing."""
    num_slots, num_out = grad_shape
    *_, need_lhs, need_rhs = args
    return 2 * num_slots * lhs_shape[2] * (x_shape[1] + num_out) * (need_lhs + need_rhs)


@sharding("adapted_linear_grads", 6)
def adapted_linear_grads_sharding(
    x: Placed, grad: Placed, lhs: Placed, rhs: Placed, order: Placed, offsets: Placed, *options
) -> Division:
    """G is divided as x (inputs) or grad (outputs) is. So is the gradient of the factor that has that size; the other's
    is a partial sum.
    """
    *_, transposed, need_lhs, need_rhs = options
    out_dim, in_dim = (2, 1) if transposed else (1, 2)
    x_place, grad_place, routing, place = REPLICATED, REPLICATED, [REPLICATED] * 2, REPLICATED
    if tokens_are_sharded(order, offsets):
        x_place, grad_place, routing, place = 0, 0, [0, PARTIAL], PARTIAL
    elif grad.placement == 1:
        grad_place, place = 1, out_dim
    elif x.placement == 1:
        x_place, place = 1, in_dim
    factors = factor_places(place)
    results = [PARTIAL if place != REPLICATED and factor == REPLICATED else factor for factor in factors]
    needed = [result if need else REPLICATED for result, need in zip(results, (need_lhs, need_rhs), strict=True)]
    return needed, [x_place, grad_place, *factors, *routing]
