"""All gradients of the fused expert MLP on the CPU; formulas are those of `scatter_ops.reference.mlp`.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
s router weights. On the output dS = <dY, y> and dy = s dY; on the input dy = dY, dS = <dpre, h> and dH = s dpre.
Roundings are those of a loop over the experts in autograd, to the bit in float32 (and two experts a token): what this
takes is y, the rows before their sum, which the forward pass keeps; without it they are computed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.activations import split
from scatter_ops.cpu.activations import activate, activate_backward, gate_and_up, pre_activation
from scatter_ops.cpu.linear import grouped_linear, grouped_weight_grad
from scatter_ops.cpu.mlp_forward import projection_bias
from scatter_ops.cpu.parts import at_once, blocks, parts
from scatter_ops.cpu.routing import (
    combine_grouped,
    slot_values,
    slot_weights,
    sum_groups,
    token_rows,
)
from scatter_ops.cpu.stacked import stacked_grads
from scatter_ops.grouping import Groups, accumulation_dtype


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
    overwrite_h: bool = False,
) -> tuple[Tensor, ...]:
    on_input, separate, dtype = weight_on == "input", layout == "separate", accumulation_dtype(x_TD.dtype)
    top_k, width = topk_weights_TK.shape[1], h_NH.shape[-1] // (2 if separate else 1)
    groups = Groups.read(offsets_E, order_N.numel())
    parameters = (gate_up, up, down, gate_up_bias, up_bias, down_bias)
    whole = at_once(order_N.numel(), width, h_NH)
    grads = _new_grads(x_TD, topk_weights_TK, parameters, groups, needs, whole)
    dy_ND = token_rows(grad_out_TD, order_N, top_k)
    scale_N1 = slot_weights(topk_weights_TK, order_N)
    scale_N1 = scale_N1.to(dtype) if on_input else scale_N1
    ds_N = scale_N1.new_empty(order_N.numel(), dtype=dtype) if needs[1] else None
    unscaled_ND = None if on_input else dy_ND.to(dtype)
    if unscaled_ND is not None:
        if ds_N is not None and y_ND is not None:
            torch.sum(unscaled_ND * y_ND.to(dtype), 1, out=ds_N)
        dy_ND = unscaled_ND * scale_N1
        unscaled_ND = unscaled_ND if y_ND is None else None
    dy_ND = dy_ND.to(x_TD.dtype)
    if needs[7]:
        sum_groups(dy_ND, groups, out=grads[7])
    if not any(needs[:7]):
        return tuple(grads)

    through_down = (needs[1] and on_input) or any(needs[i] for i in (0, 2, 3, 5, 6))
    biases, weights = ((gate_up_bias, up_bias), (gate_up, up)) if separate else ((gate_up_bias,), (gate_up,))
    bias_NH = projection_bias(biases, x_TD, width, offsets_E, order_N.numel()) if on_input else None
    x_ND = token_rows(x_TD, order_N, top_k) if needs[2] or needs[3] else None
    dx_ND = x_TD.new_empty(order_N.numel(), x_TD.shape[1]) if needs[0] and not whole else None
    dh_NH = h_NH if overwrite_h else torch.empty_like(h_NH) if whole else None
    rows = (h_NH, dh_NH, scale_N1 if on_input else None, bias_NH, unscaled_ND, dy_ND, x_ND, ds_N, dx_ND)
    for part, h, dh, scale, bias, unscaled, dy, x, ds, dx in [(groups, *rows)] if whole else parts(groups, *rows):
        da = grouped_linear(dy, down, part, [], not transposed) if through_down else None
        dh = torch.empty_like(h) if dh is None else dh
        a = _through_activation(da, ds if on_input else None, h, dh, scale, bias, activation, layout, alpha, limit)
        del da  # what is freed at once needn't come from the system, which takes as long as computing it
        if needs[4]:
            grads[4] = grouped_weight_grad(a, dy, part, transposed, out=None if whole else grads[4])
        if ds is not None and unscaled is not None:
            torch.sum(unscaled * grouped_linear(a, down, part, down_bias, transposed), 1, out=ds)
        del a
        dx = _projection_grads(dh, scale, x, dx, weights, part, transposed, needs, grads, whole)
        dx_ND = dx if whole else dx_ND
    if ds_N is not None:
        ds_N = slot_values(ds_N, order_N, groups.num_valid)
        grads[1] = ds_N.view_as(topk_weights_TK).to(topk_weights_TK.dtype)
    if dx_ND is not None:
        grads[0] = combine_grouped(dx_ND, None, order_N, groups.num_valid, top_k, None, backwards=True)
    return tuple(grads)


def _projection_grads(
    dpre_NH: Tensor,
    scale_N1: Tensor | None,
    x_ND: Tensor | None,
    dx_ND: Tensor | None,
    weights: Sequence[Sequence[Tensor]],
    groups: Groups,
    transposed: bool,
    needs: Sequence[bool],
    grads: list[Tensor],
    whole: bool,
) -> Tensor | None:
    """Put the gradients of gate_up, up and their biases in their places, and return that of x, in dx if it is given.

    scale: the router weights where they are on the input, by which dpre is multiplied in place.
    """
    for i, dpre in enumerate(dpre_NH.chunk(len(weights), dim=1)):
        if needs[5 + i]:
            sum_groups(dpre, groups, out=grads[5 + i])
        if scale_N1 is not None:
            dpre.mul_(scale_N1)
        if needs[2 + i]:
            assert x_ND is not None
            out = None if whole else grads[2 + i]
            grads[2 + i] = grouped_weight_grad(x_ND, dpre, groups, transposed, out)
        if needs[0]:
            out, add_to = (dx_ND, None) if i == 0 else (None, dx_ND)
            dx_ND = grouped_linear(dpre, weights[i], groups, [], not transposed, out, add_to)
    return dx_ND


def _new_grads(
    x_TD: Tensor,
    topk_weights_TK: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    groups: Groups,
    needs: Sequence[bool],
    whole: bool,
) -> list[Tensor]:
    """Of shape [0], but those of the parameters that are written part by part."""
    grads = [x_TD.new_empty(0), topk_weights_TK.new_empty(0)]
    for parameter, dims, need in zip(parameters, (2, 2, 2, 1, 1, 1), needs[2:], strict=True):
        if need and not (whole and dims == 2):
            grads.append(stacked_grads((groups.num_experts, *parameter[0].shape[-dims:]), x_TD, groups))
        else:
            grads.append(x_TD.new_empty(0))
    return grads


def _through_activation(
    da_NF: Tensor | None,
    ds_N: Tensor | None,
    h_NH: Tensor,
    dpre_NH: Tensor,
    scale_N1: Tensor | None,
    bias_NH: Tensor | None,
    activation: str,
    layout: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """A; dpre, which may take the place of h, is written, and dS = <dpre, h> if it is given. Without da nothing but A
    is computed.
    """
    rounded_a = []
    for h, scale, bias, da, ds, dpre in blocks(h_NH, scale_N1, bias_NH, da_NF, ds_N, dpre_NH):
        pre = pre_activation(h, scale, bias)
        gate, up = gate_and_up(pre, layout)
        if da is None:
            a = activate(gate, up, activation, alpha, limit)
        else:
            wide = dpre if scale is None else pre
            a = activate_backward(da.to(pre.dtype), gate, up, activation, alpha, limit, *split(wide, layout))
            if ds is not None:
                torch.linalg.vecdot(wide, h.to(wide.dtype), out=ds)
            if wide is not dpre:
                dpre.copy_(wide)
        rounded_a.append(a.to(h.dtype))
    return rounded_a[0] if len(rounded_a) == 1 else torch.cat(rounded_a)
