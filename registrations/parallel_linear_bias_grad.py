"""scatter_moe::parallel_linear_bias_grad: gradient of parallel_linear's biases, stacked."""

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define("parallel_linear_bias_grad(Tensor grad, Tensor order, Tensor offsets, bool grouped_out) -> Tensor")
kernels("parallel_linear_bias_grad", checks.parallel_linear_bias_grad)


@fake("parallel_linear_bias_grad", checks.parallel_linear_bias_grad)
def parallel_linear_bias_grad_fake(grad: Tensor, order: Tensor, offsets: Tensor, grouped_out: bool) -> Tensor:
    return grad.new_empty(offsets.shape[0], grad.shape[1])


def setup_context(ctx, output, grad, order, offsets, grouped_out) -> None:
    ctx.grouped_out = grouped_out
    ctx.save_for_backward(order, offsets)


def backward(ctx, grad_bias: Tensor):
    order, offsets = ctx.saved_tensors
    rows = OPS.expand([grad_bias], offsets, order.shape[0])
    if not ctx.grouped_out:
        rows = OPS.combine(rows, None, order, offsets, 1, True)
    return (rows,)


autograd("parallel_linear_bias_grad", setup_context, backward)


@sharding("parallel_linear_bias_grad", 3)
def parallel_linear_bias_grad_sharding(grad: Placed, order: Placed, offsets: Placed, grouped_out: bool) -> Division:
    if tokens_are_sharded(order, offsets):
        return [PARTIAL], [0, 0, PARTIAL]
    place = grad.placement if grad.placement in (1, PARTIAL) else REPLICATED
    return [place], [place, REPLICATED, REPLICATED]
