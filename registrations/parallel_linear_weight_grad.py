"""scatter_moe::parallel_linear_weight_grad: gradient of parallel_linear's weights, stacked.

Bilinear in x and grad: its own gradients are parallel_linear with the gradient of the result as weight.
"""

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, flops, kernels
from registrations.parallel_linear import input_grad
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define(
    "parallel_linear_weight_grad(Tensor x, Tensor grad, Tensor order, Tensor offsets, int top_k, bool grouped_in, "
    "bool grouped_out, bool transposed=False) -> Tensor"
)
kernels("parallel_linear_weight_grad", checks.parallel_linear_weight_grad)


@fake("parallel_linear_weight_grad", checks.parallel_linear_weight_grad)
def parallel_linear_weight_grad_fake(
    x: Tensor,
    grad: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool = False,
) -> Tensor:
    sizes = (x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])
    return x.new_empty(offsets.shape[0], *sizes)


def setup_context(ctx, output, x, grad, order, offsets, top_k, grouped_in, grouped_out, transposed=False) -> None:
    ctx.options = (top_k, grouped_in, grouped_out, transposed)
    ctx.needs = need_x, need_grad = x.requires_grad, grad.requires_grad
    ctx.save_for_backward(order, offsets, x if need_grad else None, grad if need_x else None)


def backward(ctx, grad_weight: Tensor):
    order, offsets, x, grad = ctx.saved_tensors
    top_k, grouped_in, grouped_out, transposed = ctx.options
    layout = (order, offsets, top_k, grouped_in, grouped_out)
    grad_x = input_grad(grad, [grad_weight], *layout, transposed) if ctx.needs[0] else None
    grad_grad = OPS.parallel_linear(x, [grad_weight], *layout, [], transposed) if ctx.needs[1] else None
    return grad_x, grad_grad


autograd("parallel_linear_weight_grad", setup_context, backward)


@flops("parallel_linear_weight_grad")
def parallel_linear_weight_grad_flops(x_shape, grad_shape, *args, **kwargs) -> int:
    """2 * N * in * out; an upper bound, since slots of sentinels cost nothing."""
    num_slots, num_out = grad_shape
    return 2 * num_slots * x_shape[1] * num_out


@sharding("parallel_linear_weight_grad", 4)
def parallel_linear_weight_grad_sharding(
    x: Placed,
    grad: Placed,
    order: Placed,
    offsets: Placed,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool = False,
) -> Division:
    if tokens_are_sharded(order, offsets):
        return [PARTIAL], [0, 0, 0, PARTIAL]
    out_dim, in_dim = (2, 1) if transposed else (1, 2)
    if grad.placement == 1:
        return [out_dim], [REPLICATED, 1, REPLICATED, REPLICATED]
    if x.placement == 1:
        return [in_dim], [1, REPLICATED, REPLICATED, REPLICATED]
    return [REPLICATED], [REPLICATED] * 4
