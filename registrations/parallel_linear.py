"""scatter_moe::parallel_linear: the grouped GEMM that reads and writes its rows grouped or scattered."""

from collections.abc import Callable, Sequence

from torch import Tensor

from registrations.library import OPS, autocast, autograd, define, fake, flops, kernels, like_parameter, requires_grad
from registrations.sharding import (
    PARTIAL,
    REPLICATED,
    Division,
    Placed,
    divisible,
    refuse,
    same_placement,
    sharding,
    tokens_are_sharded,
    weight_dims,
)
from scatter_ops import checks

define(
    "parallel_linear(Tensor x, Tensor[] weight, Tensor order, Tensor offsets, int top_k, bool grouped_in, "
    "bool grouped_out, Tensor[] bias, bool transposed=False) -> Tensor"
)
kernels("parallel_linear", checks.parallel_linear)


@fake("parallel_linear", checks.parallel_linear)
def parallel_linear_fake(
    x: Tensor,
    weight: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    return x.new_empty(order.shape[0], weight[0].shape[-1 if transposed else -2])


def setup_context(
    ctx, output, x, weight, order, offsets, top_k, grouped_in, grouped_out, bias, transposed=False
) -> None:
    ctx.options = (top_k, grouped_in, grouped_out, transposed)
    ctx.weight_is_list, ctx.num_weights = weight[0].dim() == 2, len(weight)
    ctx.bias_is_list, ctx.num_biases = bool(bias) and bias[0].dim() == 1, len(bias)
    ctx.needs = [requires_grad(value) for value in (x, weight, bias)]
    need_x, need_weight, _ = ctx.needs
    ctx.save_for_backward(order, offsets, x if need_weight else None, *(weight if need_x else ()))


def backward(ctx, grad: Tensor):
    order, offsets, x, *weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs
    _, _, grouped_out, _ = ctx.options
    grad_x, grad_weight, grad_bias = None, [None] * ctx.num_weights, [None] * ctx.num_biases
    if need_x:
        grad_x = input_grad(grad, weight, order, offsets, *ctx.options)
    if need_weight:
        stacked = OPS.parallel_linear_weight_grad(x, grad, order, offsets, *ctx.options)
        grad_weight = like_parameter(stacked, ctx.weight_is_list)
    if need_bias:
        stacked = OPS.parallel_linear_bias_grad(grad, order, offsets, grouped_out)
        grad_bias = like_parameter(stacked, ctx.bias_is_list)
    return grad_x, grad_weight, None, None, None, None, None, grad_bias


def input_grad(
    grad: Tensor,
    weight: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
) -> Tensor:
    """grad W for each slot, summed over the slots that read the same row of x."""

    def of_slots(to_groups: bool) -> Tensor:
        return OPS.parallel_linear(grad, weight, order, offsets, 1, grouped_out, to_groups, [], not transposed)

    return summed_by_row(of_slots, order, offsets, top_k, grouped_in)


def summed_by_row(
    of_slots: Callable[[bool], Tensor], order: Tensor, offsets: Tensor, top_k: int, grouped_in: bool
) -> Tensor:
    """The gradient of a linear layer's input. of_slots(to_groups) gives that of each slot, grouped or in slot order."""
    if grouped_in or top_k == 1:
        return of_slots(grouped_in)
    return OPS.combine(of_slots(True), None, order, offsets, top_k, True)


autograd("parallel_linear", setup_context, backward)


@autocast("parallel_linear")
def parallel_linear_autocast(cast, x, weight, order, offsets, top_k, grouped_in, grouped_out, bias, transposed=False):
    return cast(x), cast(weight), order, offsets, top_k, grouped_in, grouped_out, cast(bias), transposed


@flops("parallel_linear")
def parallel_linear_flops(x_shape, weight_shapes, *args, out_shape, **kwargs) -> int:
    """2 * N * in * out; an upper bound, since slots of sentinels cost nothing."""
    num_slots, _ = out_shape
    rows, columns = weight_shapes[0][-2:]
    return 2 * num_slots * rows * columns


@sharding("parallel_linear", 4)
def parallel_linear_sharding(
    x: Placed,
    weight: Sequence[Placed],
    order: Placed,
    offsets: Placed,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Placed],
    transposed: bool = False,
) -> Division:
    placement, (out_dim, in_dim) = same_placement("weight", weight), weight_dims(weight, transposed)
    if placement not in (REPLICATED, out_dim, in_dim):
        raise refuse("weight", placement, f"replicated, {out_dim} (columns) and {in_dim} (rows)")
    if tokens_are_sharded(order, offsets):
        if placement != REPLICATED:
            raise refuse("weight", placement, "replicated, where the tokens are sharded on this dimension of the mesh")
        return [0], [0, REPLICATED, 0, PARTIAL, REPLICATED]
    if placement == REPLICATED:
        return [REPLICATED], [REPLICATED] * 5
    divisible("weight", weight[0].shape[placement], weight[0].ranks)
    if placement == in_dim:
        return [PARTIAL], [1, in_dim, REPLICATED, REPLICATED, PARTIAL]
    return [1], [REPLICATED, out_dim, REPLICATED, REPLICATED, len(bias[0].shape) - 1 if bias else REPLICATED]
