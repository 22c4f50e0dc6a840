"""mlp_backward on CUDA: gradient of the activation, then of the parameters and of x, each from the tensors before it.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cuda.device import float64_by_reference, on_its_device
from scatter_ops.cuda.dispatch import regrouped
from scatter_ops.cuda.gate_up_backward import gate_up_backward
from scatter_ops.cuda.glu import Glu
from scatter_ops.cuda.glu_backward import (
    GluGradients,
    add_bias_partials,
    glu_backward,
    num_column_tiles,
    sum_partials,
)
from scatter_ops.cuda.operands import Routing, Rows, select_config
from scatter_ops.cuda.parameters import expert_bias, expert_weight
from scatter_ops.cuda.weight_grad import grouped_sum, oriented_weight_grad


@float64_by_reference
@on_its_device
def mlp_backward(
    grad_out_TD: Tensor,
    h: Tensor,
    y: Tensor | None,
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: str,
    transposed: bool,
    weight_on: str,
    alpha: float,
    limit: float,
    out_dtype: torch.dtype | None,
    needs: Sequence[bool],
    *,
    overwrite_h: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of x, topk_weights, gate_up, up, down, gate_up_bias, up_bias, down_bias; [0] where not needed.

    y isn't read: A, which is computed anyway, gives the gradient of the router weights. overwrite_h: the caller reads h
    no more, so that its own gradient may take its memory.
    """
    routing = Routing(order_N, offsets_E)
    biases = expert_bias(gate_up_bias), expert_bias(up_bias)
    on_input = weight_on == "input"
    glu = Glu(routing, topk_weights_TK.contiguous(), *biases, activation, layout, on_input, alpha, limit)
    grad_out = Rows(grad_out_TD.to(x_TD.dtype), glu.top_k)
    grads = [x_TD.new_empty(0) for _ in needs]  # apart: results of an operator may not alias
    if needs[7]:
        grads[7] = grouped_sum(grad_out, None if on_input else glu.topk_weights, routing, x_TD.dtype)
    if not any(needs[:7]):
        return tuple(grads)

    gradients, grad_rows = _activation_gradients(grad_out, h, down, down_bias, transposed, glu, needs, overwrite_h)
    grad_h_NH, grad_pre_NH, scaled_a_NF, partials = gradients
    if partials is not None:
        grads[1] = sum_partials(partials, glu)
    if scaled_a_NF is not None:
        grads[4] = oriented_weight_grad(grad_rows, Rows(scaled_a_NF, 0), routing, transposed)
    del gradients, grad_rows, scaled_a_NF  # their memory serves what follows
    for i in (5, 6):
        if needs[i]:
            assert grad_pre_NH is not None
            half = glu.projections(grad_pre_NH)[i - 5]
            grads[i] = grouped_sum(Rows(half, 0), None, routing, x_TD.dtype)
    if grad_h_NH is None:
        return tuple(grads)
    numbers = 0, 2, 3
    needs_last = [needs[i] for i in numbers]
    last = gate_up_backward(grad_h_NH, x_TD, gate_up, up, transposed, glu, needs_last)
    for i, grad in zip(numbers, last, strict=True):
        if grad is not None:
            grads[i] = grad
    return tuple(grads)


def _activation_gradients(
    grad_out: Rows,
    h_NH: Tensor,
    down: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    transposed: bool,
    glu: Glu,
    needs: Sequence[bool],
    overwrite_h: bool,
) -> tuple[GluGradients, Rows]:
    """What the activation's backward gives, and grad_out as it was read: gathered in place or regrouped."""
    need_x, need_s, need_gate_up, need_up, need_down, *need_biases = needs
    weight = expert_weight(down, transposed).transposed()
    bias_column = need_s and bool(down_bias) and not glu.on_input
    config = select_config("glu_backward", h_NH, glu.routing, weight.n, weight.k)
    grad_rows = regrouped(grad_out, glu.routing) if config.regroup else grad_out
    first = glu_backward(
        grad_rows,
        h_NH,
        weight,
        glu,
        need_h=need_x or need_gate_up or need_up,
        need_pre=any(need_biases[:2]),
        need_a=need_down,
        num_partials=num_column_tiles(h_NH, weight, glu) + bias_column if need_s else 0,
        overwrite_h=overwrite_h,
    )
    if bias_column and h_NH.numel():
        assert first.partials is not None
        add_bias_partials(first.partials, grad_out, expert_bias(down_bias), glu)
    return first, grad_rows
