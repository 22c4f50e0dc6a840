"""scatter_moe::adapted_linear_forward: what adapted_linear is on the CPU."""

from collections.abc import Sequence

from torch import Tensor

from registrations.adapted_linear import by_thin_products
from registrations.library import OPS, autograd, define, fake, flops, kernels, like_parameter, requires_grad
from registrations.parallel_linear import parallel_linear_sharding, summed_by_row
from registrations.sharding import REPLICATED, Division, Placed, Placement, sharding
from scatter_ops import checks

define(
    "adapted_linear_forward(Tensor x, Tensor weight, Tensor lhs, Tensor rhs, Tensor order, Tensor offsets, "
    "float scale, int top_k, bool grouped_in, bool grouped_out, Tensor[] bias, bool transposed) -> Tensor"
)
kernels("adapted_linear_forward", checks.adapted_linear_forward, on_cuda=by_thin_products)


@fake("adapted_linear_forward", checks.adapted_linear_forward)
def adapted_linear_forward_fake(
    x: Tensor,
    weight: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    order: Tensor,
    offsets: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool,
) -> Tensor:
    return x.new_empty(order.shape[0], weight.shape[2 if transposed else 1])


def setup_context(
    ctx, output, x, weight, lhs, rhs, order, offsets, scale, top_k, grouped_in, grouped_out, bias, transposed
) -> None:
    ctx.options = (scale, top_k, grouped_in, grouped_out, transposed)
    ctx.bias_is_list, ctx.num_biases = bool(bias) and bias[0].dim() == 1, len(bias)
    ctx.needs = need_x, need_weight, need_lhs, need_rhs, _ = [*map(requires_grad, (x, weight, lhs, rhs, bias))]
    need_factors = need_lhs or need_rhs
    factors = (lhs, rhs) if need_x or need_factors else (None, None)
    ctx.save_for_backward(
        x if need_weight or need_factors else None, weight if need_x else None, *factors, order, offsets
    )


def backward(ctx, grad: Tensor):
    x, weight, lhs, rhs, order, offsets = ctx.saved_tensors
    need_x, need_weight, *need_factors, need_bias = ctx.needs
    scale, top_k, grouped_in, grouped_out, transposed = ctx.options
    layout = (order, offsets, top_k, grouped_in, grouped_out, transposed)
    grad_x, grad_weight, grad_lhs, grad_rhs, grad_bias = None, None, None, None, [None] * ctx.num_biases

    def input_grad(to_groups: bool) -> Tensor:
        routing = (order, offsets, scale, 1, grouped_out, to_groups)
        return OPS.adapted_linear_forward(grad, weight, lhs, rhs, *routing, [], not transposed)

    if need_x:
        grad_x = summed_by_row(input_grad, order, offsets, top_k, grouped_in)
    if need_weight:
        grad_weight = OPS.parallel_linear_weight_grad(x, grad, *layout)
    if any(need_factors):
        options = (scale, top_k, grouped_in, grouped_out, transposed, *need_factors)
        factor_grads = OPS.adapted_linear_grads(x, grad, lhs, rhs, order, offsets, *options)
        grad_lhs, grad_rhs = (g if need else None for g, need in zip(factor_grads, need_factors, strict=True))
    if need_bias:
        stacked = OPS.parallel_linear_bias_grad(grad, order, offsets, grouped_out)
        grad_bias = like_parameter(stacked, ctx.bias_is_list)
    return grad_x, grad_weight, grad_lhs, grad_rhs, None, None, None, None, None, None, grad_bias


autograd("adapted_linear_forward", setup_context, backward)


@flops("adapted_linear_forward")
def adapted_linear_forward_flops(x_shape, weight_shape, lhs_shape, *args, out_shape, **kwargs) -> int:
    """2 * N * (in * out + r * (in + out)), those of thin products; an upper bound, since sentinels cost nothing."""
    num_slots, _ = out_shape
    _, rows, columns = weight_shape
    return 2 * num_slots * (rows * columns + lhs_shape[2] * (rows + columns))


@sharding("adapted_linear_forward", 6)
def adapted_linear_forward_sharding(
    x: Placed,
    weight: Placed,
    lhs: Placed,
    rhs: Placed,
    order: Placed,
    offsets: Placed,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Placed],
    transposed: bool,
) -> Division:
    """parallel_linear's, with the factor that has the outputs, or the inputs, divided as the weight is."""
    layout = (order, offsets, top_k, grouped_in, grouped_out)
    results, places = parallel_linear_sharding(x, [weight], *layout, bias, transposed)
    x_place, weight_place, *rest = places
    return results, [x_place, weight_place, *factor_places(weight_place), *rest]


def factor_places(weight_place: Placement) -> tuple[Placement, Placement]:
    """Of lhs [E, P, r] and rhs [E, r, Q] where the weight [E, P, Q] is at `weight_place`."""
    return 1 if weight_place == 1 else REPLICATED, 2 if weight_place == 2 else REPLICATED
