"""scatter_moe::mlp_forward: the fused expert MLP, and what backward reads: h, which it may overwrite, and y.

h is the pre-activation, y are the output rows before the router weights and their sum, both in grouped order.
"""

import torch
from torch import Tensor

from registrations.library import autograd, call, define, fake, flops, kernels, like_parameter, requires_grad
from registrations.mlp import ARGUMENTS, mlp_division
from registrations.sharding import PARTIAL, REPLICATED, Division, sharding
from scatter_ops import checks

OPTIONS = "bool transposed, str weight_on, float alpha, float limit, ScalarType? out_dtype"
define(f"mlp_forward({ARGUMENTS}, {OPTIONS}, bool save_h, bool save_y) -> (Tensor out, Tensor h, Tensor y)")
kernels("mlp_forward", checks.mlp_forward, planned=True)


@fake("mlp_forward", checks.mlp_forward)
def mlp_forward_fake(
    x: Tensor, topk_weights: Tensor, order: Tensor, offsets: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    gate_up, up, *_, transposed, _, _, _, out_dtype, save_h, save_y = rest
    width = gate_up[0].shape[-1 if transposed else -2]
    out = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    h = x.new_empty((order.shape[0], 2 * width if up else width) if save_h else 0)
    return out, h, x.new_empty((order.shape[0], x.shape[1]) if save_y else 0)


def setup_context(ctx, output, x, topk_weights, order, offsets, *rest) -> None:
    parameters, ctx.options, (save_h, save_y) = rest[:6], rest[6:-2], rest[-2:]
    ctx.needs = [requires_grad(value) for value in (x, topk_weights, *parameters)]
    need_h, need_x = any(ctx.needs[:7]), ctx.needs[2] or ctx.needs[3]
    if need_h and not save_h:
        raise ValueError("save_h: got False, accepted is True where a gradient other than down_bias's is required")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.x_dtype, ctx.model_width = x.dtype, x.shape[1]
    ctx.lengths = [len(parameter) for parameter in parameters]
    ctx.is_list = [bool(p) and p[0].dim() == dims for p, dims in zip(parameters, (2, 2, 2, 1, 1, 1), strict=True)]
    tensors = [tensor for parameter in parameters for tensor in parameter]
    y = output[2] if save_y and ctx.needs[1] else None
    saved = (output[1] if need_h else None, y, x if need_x else None, topk_weights, order, offsets)
    ctx.save_for_backward(*saved, *tensors)


def backward(ctx, grad_out: Tensor | None, _grad_h: None, _grad_y: None):
    h, y, x, topk_weights, order, offsets, *tensors = ctx.saved_tensors
    no_grads = [[None] * length for length in ctx.lengths]
    if grad_out is None:
        return None, None, None, None, *no_grads
    if h is None:
        h = grad_out.new_empty(0, dtype=ctx.x_dtype)
    if x is None:
        x = grad_out.new_empty(0, ctx.model_width, dtype=ctx.x_dtype)
    remaining = iter(tensors)
    parameters = [[next(remaining) for _ in range(length)] for length in ctx.lengths]
    name = "mlp_backward_" if (h.is_cuda or ctx.inside) and _read_for_the_last_time(h) else "mlp_backward"
    grads = call(name, grad_out, h, y, x, topk_weights, order, offsets, *parameters, *ctx.options, ctx.needs)
    grad_x, grad_topk_weights = (grad if need else None for grad, need in zip(grads[:2], ctx.needs[:2], strict=True))
    parameter_grads = [
        like_parameter(grad, is_list) if need else none
        for grad, is_list, need, none in zip(grads[2:], ctx.is_list, ctx.needs[2:], no_grads, strict=True)
    ]
    return grad_x, grad_topk_weights, None, None, *parameter_grads


def _read_for_the_last_time(h: Tensor) -> bool:
    """Whether this backward pass is the last that reads h: the graph isn't retained. Never while a compiler traces
    (h is a tensor of another kind then): a mutation of what the forward pass saved would mean a copy of it.
    """
    if type(h) is not Tensor:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


autograd("mlp_forward", setup_context, backward)


@flops("mlp_forward")
def mlp_forward_flops(
    x_shape, topk_weights_shape, order_shape, offsets_shape, gate_up, up, down, *args, **kwargs
) -> int:
    """2 * N * in * out for each matrix; an upper bound, since slots of sentinels cost nothing."""
    num_slots = order_shape[0]
    return sum(2 * num_slots * shapes[0][-1] * shapes[0][-2] for shapes in (gate_up, up, down) if shapes)


@sharding("mlp_forward", 10)
def mlp_forward_sharding(*arguments) -> Division:
    division, inputs = mlp_division(*arguments)
    out, h = {"replicated": (REPLICATED, REPLICATED), "tokens": (0, 0), "columns": (PARTIAL, 1)}[division]
    save_h, save_y = arguments[-2:]
    return [out, h if save_h else REPLICATED, out if save_y else REPLICATED], inputs
