"""The fused expert MLP: linear, (gated) activation, linear, weighted sum over each token's experts.

With s the router weight. On the output: pre = h = x W^T + b, A = act(pre), y = A W_down^T + b_down, out = sum_k s y.
On the input (llama4): h = x W^T, pre = s h + b, A and y as above, out = sum_k y.
Roundings to x's dtype: h, A, y and out; everything between is in the accumulation dtype. The CPU also rounds what
PyTorch's activations and their derivatives round in that dtype, unless s is on the input.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.activations import activate, activate_backward, join, split
from scatter_ops.grouping import accumulation_dtype, experts
from scatter_ops.reference.linear import parallel_linear, parallel_linear_weight_grad
from scatter_ops.reference.routing import (
    combine,
    combine_backward,
    dispatch,
    expand,
    expand_backward,
    slot_order,
    slot_weights,
)


def mlp_forward(
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
    save_h: bool,
    save_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [T, D], h [N, H] and y [N, D], both in grouped order, h in the parameters' column order.

    h is [0] unless save_h, y is [0] unless save_y.
    """
    routing = (order_N, offsets_E, topk_weights_TK.shape[1])
    on_input = weight_on == "input"
    h_NH = parallel_linear(x_TD, gate_up, *routing, False, True, [] if on_input else gate_up_bias, transposed)
    if layout == "separate":
        h_up = parallel_linear(x_TD, up, *routing, False, True, [] if on_input else up_bias, transposed)
        h_NH = torch.cat((h_NH, h_up), dim=1)
    dtype = accumulation_dtype(x_TD.dtype)
    pre_NH = h_NH.to(dtype)
    if on_input:
        scale_N1 = slot_weights(topk_weights_TK, order_N, True).to(dtype)
        pre_NH = _pre_activation(pre_NH, scale_N1, offsets_E, (gate_up_bias, up_bias), layout)
    a_NF = activate(*split(pre_NH, layout), activation, alpha, limit).to(x_TD.dtype)
    y_ND = parallel_linear(a_NF, down, *routing, True, True, down_bias, transposed)
    out_TD = combine(y_ND, None if on_input else topk_weights_TK, *routing, True, out_dtype)
    empty = h_NH.new_empty
    return out_TD, h_NH if save_h else empty(0), y_ND if save_y else empty(0)


def mlp_backward(
    grad_out_TD: Tensor,
    h_NH: Tensor,
    y_ND: Tensor | None,
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
) -> tuple[Tensor, ...]:
    """Gradients of x, topk_weights, gate_up, up, down, gate_up_bias, up_bias, down_bias; `needs` has a flag for each.

    Parameters' gradients are stacked, in the parameters' own layout; one that isn't needed has shape [0].
    x is read for its dtype, and for its values only if gate_up or up is needed: it may be [0, D] otherwise.
    h is read unless only down_bias is needed: it may be [0] then. y, where it is given, spares computing it again.
    All is computed in the accumulation dtype from h as it was stored; A alone is rounded, as in the forward.
    """
    dtype, on_input = accumulation_dtype(x_TD.dtype), weight_on == "input"
    routing = (order_N, offsets_E, topk_weights_TK.shape[1])
    scale_N1 = slot_weights(topk_weights_TK, order_N, True).to(dtype)
    grad_y_ND = dispatch(grad_out_TD.to(dtype), *routing) * (1 if on_input else scale_N1)
    grads: dict[int, Tensor] = {}
    if needs[7]:
        grads[7] = expand_backward(grad_y_ND, offsets_E)
    if not any(needs[:7]):
        return _round(grads, x_TD, topk_weights_TK)

    h_NH = h_NH.to(dtype)
    pre_NH = _pre_activation(h_NH, scale_N1, offsets_E, (gate_up_bias, up_bias), layout) if on_input else h_NH
    a_NF = activate(*split(pre_NH, layout), activation, alpha, limit).to(x_TD.dtype).to(dtype)
    if needs[1] and not on_input:
        y_ND = parallel_linear(a_NF, down, *routing, True, True, down_bias, transposed) if y_ND is None else y_ND
        grads[1] = combine_backward(grad_out_TD, y_ND, topk_weights_TK, *routing, True, False, True)[1]
    if needs[4]:
        grads[4] = parallel_linear_weight_grad(a_NF, grad_y_ND, *routing, True, True, transposed)

    grad_a_NF = parallel_linear(grad_y_ND, down, *routing, True, True, [], not transposed)
    grad_pre_NH = join(*activate_backward(grad_a_NF, *split(pre_NH, layout), activation, alpha, limit), layout)
    grad_h_NH = scale_N1 * grad_pre_NH if on_input else grad_pre_NH
    if needs[1] and on_input:
        grad_s_N1 = (grad_pre_NH * h_NH).sum(1, keepdim=True)
        grads[1] = slot_order(grad_s_N1, order_N, offsets_E).view_as(topk_weights_TK)
    grads |= _projection_grads(grad_h_NH, grad_pre_NH, x_TD, (gate_up, up), layout, routing, transposed, needs)
    return _round(grads, x_TD, topk_weights_TK)


def _projection_grads(
    grad_h_NH: Tensor,
    grad_pre_NH: Tensor,
    x_TD: Tensor,
    weights: Sequence[Sequence[Tensor]],
    layout: str,
    routing: tuple[Tensor, Tensor, int],
    transposed: bool,
    needs: Sequence[bool],
) -> dict[int, Tensor]:
    """Gradients of x, gate_up, up and their biases, by their place among all."""
    grads, rows = {}, []
    pairs = zip(_projections(grad_h_NH, layout), _projections(grad_pre_NH, layout), strict=True)
    for i, (grad_h, grad_pre) in enumerate(pairs):
        if needs[0]:
            rows.append(parallel_linear(grad_h, weights[i], *routing, True, True, [], not transposed))
        if needs[2 + i]:
            grads[2 + i] = parallel_linear_weight_grad(x_TD.to(grad_h.dtype), grad_h, *routing, False, True, transposed)
        if needs[5 + i]:
            grads[5 + i] = expand_backward(grad_pre, routing[1])
    if needs[0]:
        grads[0] = combine(sum(rows[1:], rows[0]), None, *routing, True)
    return grads


def _pre_activation(
    h_NH: Tensor, scale_N1: Tensor, offsets_E: Tensor, biases: Sequence[Sequence[Tensor]], layout: str
) -> Tensor:
    """s h + b, where the router weight is on the input. biases: those of gate_up and of up, where it is apart."""
    pre_NH = scale_N1 * h_NH
    if not any(biases):
        return pre_NH
    parts = biases if layout == "separate" else biases[:1]
    no_bias = pre_NH.new_zeros(offsets_E.numel(), h_NH.shape[1] // len(parts))
    stacked = [torch.stack(tuple(experts(bias, 1))).to(pre_NH.dtype) if bias else no_bias for bias in parts]
    return pre_NH + expand([torch.cat(stacked, dim=1)], offsets_E, h_NH.shape[0])


def _projections(h_NH: Tensor, layout: str) -> Sequence[Tensor]:
    """The columns of h that belong to gate_up and, where it is apart, to up."""
    return h_NH.chunk(2, dim=1) if layout == "separate" else (h_NH,)


def _round(grads: dict[int, Tensor], x: Tensor, topk_weights: Tensor) -> tuple[Tensor, ...]:
    dtypes = (x.dtype, topk_weights.dtype, *[x.dtype] * 6)
    return tuple(grads[i].to(dtype) if i in grads else x.new_empty(0, dtype=dtype) for i, dtype in enumerate(dtypes))
