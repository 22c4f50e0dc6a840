"""All gradients of the fused expert MLP on the CPU; formulas are those of `scatter_ops.reference.mlp`.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
s router weights, dA' the gradient of A before s: on the output dA = s dA', dS = <dA', A> + <dY, b_down>; on the input
dA = dA', dS = <dpre, h>.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.activations import split
from scatter_ops.cpu.activations import activate, activate_backward, blocks
from scatter_ops.cpu.linear import grouped_linear, grouped_weight_grad
from scatter_ops.cpu.mlp_forward import PreActivation
from scatter_ops.cpu.routing import expand_backward, slot_rows, sum_slots, zero_sentinels
from scatter_ops.grouping import Groups, experts


def mlp_backward(
    grad_out_TD: Tensor,
    h_NH: Tensor,
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
    on_input, separate = weight_on == "input", layout == "separate"
    grads = [(topk_weights_TK if i == 1 else x_TD).new_empty(0) for i in range(len(needs))]
    tokens_N = order_N // topk_weights_TK.shape[1]
    groups = Groups(offsets_E, order_N.numel())
    dy_ND = zero_sentinels(grad_out_TD.to(x_TD.dtype).index_select(0, tokens_N), groups.num_valid)
    biases = (gate_up_bias, up_bias) if separate else (gate_up_bias,)
    pre = PreActivation(h_NH, topk_weights_TK, order_N, offsets_E, biases, layout, on_input)
    if needs[7]:
        grads[7] = expand_backward(dy_ND if on_input else dy_ND * pre.scale_N1, offsets_E).to(x_TD.dtype)
    if not any(needs[:7]):
        return tuple(grads)

    rows_N = slot_rows(order_N)
    through_down = any(needs[:4]) or any(needs[5:7])
    da_NF = grouped_linear(dy_ND, down, groups, [], not transposed) if through_down else None
    scaled_a_NF, ds_N, dpre_NH, dh_NH = _through_activation(da_NF, pre, activation, alpha, limit)
    if needs[4]:
        grads[4] = grouped_weight_grad(scaled_a_NF, dy_ND, groups, transposed)
    if needs[1]:
        if down_bias and not on_input:
            _add_bias_share(ds_N, dy_ND, down_bias, groups)
        ds_N = zero_sentinels(ds_N, groups.num_valid).index_select(0, rows_N)
        grads[1] = ds_N.view_as(topk_weights_TK).to(topk_weights_TK.dtype)
    del da_NF, scaled_a_NF, dy_ND
    rows_ND = x_TD.index_select(0, tokens_N) if needs[2] or needs[3] else x_TD
    dx_ND = None
    for i, weight in enumerate((gate_up, up) if separate else (gate_up,)):
        columns = _columns(i, h_NH, separate)
        if needs[2 + i]:
            grads[2 + i] = grouped_weight_grad(rows_ND, dh_NH[:, columns], groups, transposed)
        if needs[5 + i]:
            grads[5 + i] = expand_backward(dpre_NH[:, columns], offsets_E)
        if needs[0]:
            dx_ND = grouped_linear(dh_NH[:, columns], weight, groups, [], not transposed, add_to=dx_ND)
    if dx_ND is not None:
        grads[0] = sum_slots(dx_ND, None, rows_N, groups.num_valid, topk_weights_TK.shape[1], None)
    return tuple(grads)


def _through_activation(
    da_NF: Tensor | None, pre: PreActivation, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of A that dW_down takes, dS without the bias' share, dpre and dh.

    da_NF is the gradient of A before the router weight, and is overwritten by the first result; without it nothing but
    that is computed.
    """
    h_NH, on_input = pre.h_NH, pre.on_input
    num_slots, width = h_NH.shape
    if da_NF is None:
        scaled_a_NF = h_NH.new_empty(num_slots, width if pre.layout == "plain" else width // 2)
        for block in blocks(h_NH):
            value = activate(*pre[block], activation, alpha, limit)
            scaled_a_NF[block] = value if on_input else value.mul_(pre.scale_N1[block])
        nothing = h_NH.new_empty(0)
        return scaled_a_NF, nothing, nothing, nothing

    ds_N, dh_NH = h_NH.new_empty(num_slots, dtype=pre.dtype), torch.empty_like(h_NH)
    dpre_NH = torch.empty_like(h_NH) if on_input else dh_NH
    for block in blocks(h_NH):
        da, scale = da_NF[block].to(pre.dtype), pre.scale_N1[block]
        grad = da if on_input else da * scale
        dpre = h_NH.new_empty(len(da), width, dtype=pre.dtype)
        value = activate_backward(grad, *pre[block], activation, alpha, limit, *split(dpre, pre.layout))
        if on_input:
            ds_N[block] = torch.linalg.vecdot(dpre, h_NH[block].to(pre.dtype))
            dpre_NH[block] = dpre
            torch.mul(dpre, scale, out=dh_NH[block])
            da_NF[block] = value
        else:
            ds_N[block] = torch.linalg.vecdot(da, value)
            dh_NH[block] = dpre
            da_NF[block] = value.mul_(scale)
    return da_NF, ds_N, dpre_NH, dh_NH


def _add_bias_share(ds_N: Tensor, dy_ND: Tensor, down_bias: Sequence[Tensor], groups: Groups) -> None:
    """dS += <dY, b_down>."""
    biases, splits = experts(down_bias, 1), zip(ds_N.split(groups.sizes), dy_ND.split(groups.sizes), strict=True)
    for e, (ds, dy) in zip(groups.experts, splits, strict=False):
        ds += dy.to(ds.dtype) @ biases[e].to(ds.dtype)


def _columns(projection: int, h_NH: Tensor, separate: bool) -> slice:
    """The columns of h that belong to gate_up (projection 0) or, where it is apart, to up (1)."""
    width = h_NH.shape[1] // 2
    return slice(projection * width, (projection + 1) * width) if separate else slice(None)
