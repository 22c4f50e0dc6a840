"""scatter_moe::expand_backward: the sum of each expert's grouped rows."""

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels
from scatter_ops import checks

define("expand_backward(Tensor grad, Tensor offsets) -> Tensor")
kernels("expand_backward", checks.expand_backward)


@fake("expand_backward", checks.expand_backward)
def expand_backward_fake(grad: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0], *grad.shape[1:])


def setup_context(ctx, output, grad, offsets) -> None:
    ctx.num_rows = grad.shape[0]
    ctx.save_for_backward(offsets)


def backward(ctx, grad_sums: Tensor):
    (offsets,) = ctx.saved_tensors
    return (OPS.expand([grad_sums], offsets, ctx.num_rows),)


autograd("expand_backward", setup_context, backward)
