"""scatter_moe::dispatch: rows of tokens copied to the grouped rows of their slots."""

from torch import Tensor

from registrations.library import OPS, autograd, define, fake, kernels
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding, tokens_are_sharded
from scatter_ops import checks

define("dispatch(Tensor x, Tensor order, Tensor offsets, int top_k) -> Tensor")
kernels("dispatch", checks.dispatch)


@fake("dispatch", checks.dispatch)
def dispatch_fake(x: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def setup_context(ctx, output, x, order, offsets, top_k) -> None:
    ctx.top_k = top_k
    ctx.save_for_backward(order, offsets)


def backward(ctx, grad: Tensor):
    order, offsets = ctx.saved_tensors
    return (OPS.combine(grad, None, order, offsets, ctx.top_k, True),)


autograd("dispatch", setup_context, backward)


@sharding("dispatch", 3)
def dispatch_sharding(x: Placed, order: Placed, offsets: Placed, top_k: int) -> Division:
    if tokens_are_sharded(order, offsets):
        return [0], [0, 0, PARTIAL]
    place = x.placement if x.placement in (1, PARTIAL) else REPLICATED
    return [place], [place, REPLICATED, REPLICATED]
