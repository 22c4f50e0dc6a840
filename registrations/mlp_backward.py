"""scatter_moe::mlp_backward: all gradients of the fused expert MLP. Second derivatives are refused."""

from torch import Tensor

from registrations.library import define, fake, flops, kernels, not_differentiable
from registrations.mlp import ARGUMENTS, mlp_division
from registrations.mlp_forward import OPTIONS
from registrations.sharding import PARTIAL, REPLICATED, Division, Placed, sharding
from scatter_ops import checks

SIGNATURE = (
    f"{ARGUMENTS}, {OPTIONS}, bool[] needs) -> (Tensor grad_x, Tensor grad_topk_weights, Tensor grad_gate_up, "
    "Tensor grad_up, Tensor grad_down, Tensor grad_gate_up_bias, Tensor grad_up_bias, Tensor grad_down_bias)"
)
define(f"mlp_backward(Tensor grad_out, Tensor h, Tensor? y, {SIGNATURE}")
kernels("mlp_backward", checks.mlp_backward)


@fake("mlp_backward", checks.mlp_backward)
def mlp_backward_fake(
    grad_out: Tensor,
    h: Tensor,
    y: Tensor | None,
    x: Tensor,
    topk_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    *rest,
) -> tuple[Tensor, ...]:
    parameters, needs = rest[:6], rest[-1]
    num_experts = offsets.shape[0]
    shapes: list[tuple[int, ...]] = [grad_out.shape, topk_weights.shape]
    for parameter, dims in zip(parameters, (2, 2, 2, 1, 1, 1), strict=True):
        shapes.append((num_experts, *parameter[0].shape[-dims:]) if parameter else (0,))
    dtypes = [x.dtype, topk_weights.dtype] + [x.dtype] * 6
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


SECOND_DERIVATIVES = (
    "scatter_moe::mlp has no second derivatives: write the expert with scatter_moe::parallel_linear, which has them, "
    "compile a naive loop with another backend than scatter_moe, or call backward without create_graph"
)
not_differentiable("mlp_backward", SECOND_DERIVATIVES)


@flops("mlp_backward")
def mlp_backward_flops(
    grad_out, h, y, x, topk_weights, order_shape, offsets, gate_up, up, down, *args, **kwargs
) -> int:
    """2 * N * in * out for each product that a needed gradient takes; an upper bound, as for mlp_forward."""
    need_x, need_topk_weights, need_gate_up, need_up, need_down, need_gate_up_bias, need_up_bias, _ = args[-1]
    num_slots = order_shape[0]
    cost_gate_up, cost_up, cost_down = (
        2 * num_slots * shapes[0][-1] * shapes[0][-2] if shapes else 0 for shapes in (gate_up, up, down)
    )
    through_down = need_x or need_topk_weights or need_gate_up or need_up or need_gate_up_bias or need_up_bias
    return (
        cost_down * (through_down + need_down) + cost_gate_up * (need_x + need_gate_up) + cost_up * (need_x + need_up)
    )


@sharding("mlp_backward", 13)
def mlp_backward_sharding(grad_out: Placed, h: Placed, y: Placed | None, *arguments) -> Division:
    division, inputs = mlp_division(*arguments)
    transposed, needs = arguments[12], arguments[-1]
    column, row = (2, 1) if transposed else (1, 2)
    grad, h_place, y_place, results = {
        "replicated": (REPLICATED, REPLICATED, REPLICATED, [REPLICATED] * 8),
        "tokens": (0, 0, 0, [0, 0, *[PARTIAL] * 6]),
        "columns": (REPLICATED, 1, PARTIAL, [PARTIAL, PARTIAL, column, column, row, 1, 1, REPLICATED]),
    }[division]
    results = [place if need else REPLICATED for place, need in zip(results, needs, strict=True)]
    return results, [grad, h_place if len(h.shape) == 2 else REPLICATED, y_place, *inputs]
