"""The fused expert MLP on the CPU; formulas and roundings are those of `scatter_ops.reference.mlp`.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.activations import activated
from scatter_ops.cpu.few_tokens import are_few, mlp_of_few_tokens
from scatter_ops.cpu.linear import grouped_linear
from scatter_ops.cpu.parts import at_once, parts
from scatter_ops.cpu.routing import combine_grouped, expand, slot_weights, token_rows, zero_sentinels
from scatter_ops.grouping import Groups, accumulation_dtype, experts


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
    top_k, on_input = topk_weights_TK.shape[1], weight_on == "input"
    groups = Groups.read(offsets_E, order_N.numel())
    general = on_input or save_h or save_y or gate_up_bias or up_bias or down_bias
    if not general and are_few(order_N.shape[0], groups):
        arguments = (x_TD, topk_weights_TK, order_N, groups, gate_up, up, down)
        out_TD = mlp_of_few_tokens(*arguments, activation, layout, transposed, alpha, limit, out_dtype)
        return out_TD, x_TD.new_empty(0), x_TD.new_empty(0)
    rows_ND, width = token_rows(x_TD, order_N, top_k), gate_up[0].shape[-1 if transposed else -2]
    scale_N1 = slot_weights(topk_weights_TK, order_N).to(accumulation_dtype(x_TD.dtype)) if on_input else None
    bias_NH, biases = None, (gate_up_bias, up_bias) if up else (gate_up_bias,)
    if on_input:
        bias_NH = projection_bias(biases, x_TD, width, offsets_E, order_N.numel())
        gate_up_bias = up_bias = ()

    def of_rows(groups, rows, scale, bias, h, y) -> tuple[Tensor, Tensor]:
        """h and y of these rows; written to them where they are given."""
        if up:
            h = rows.new_empty(groups.num_rows, 2 * width) if h is None else h
            grouped_linear(rows, gate_up, groups, gate_up_bias, transposed, out=h[:, :width])
            grouped_linear(rows, up, groups, up_bias, transposed, out=h[:, width:])
        else:
            h = grouped_linear(rows, gate_up, groups, gate_up_bias, transposed, out=h)
        a = activated(h, scale, bias, layout, activation, alpha, limit)
        return h, grouped_linear(a, down, groups, down_bias, transposed, out=y)

    if at_once(order_N.numel(), width, x_TD):
        h_NH, y_ND = of_rows(groups, rows_ND, scale_N1, bias_NH, None, None)
    else:
        y_ND = x_TD.new_empty(order_N.numel(), x_TD.shape[1])
        h_NH = x_TD.new_empty(order_N.numel(), 2 * width if up else width) if save_h else None
        for part in parts(groups, rows_ND, scale_N1, bias_NH, h_NH, y_ND):
            of_rows(*part)
    empty = x_TD.new_empty
    h_NH = empty(0) if h_NH is None or not save_h else zero_sentinels(h_NH, groups.num_valid)
    kept_y = zero_sentinels(y_ND, groups.num_valid) if save_y else empty(0)
    scale_TK, options = None if on_input else topk_weights_TK, (groups.num_valid, top_k, out_dtype)
    return combine_grouped(y_ND, scale_TK, order_N, *options, overwrite_y=not save_y), h_NH, kept_y


def projection_bias(
    biases: Sequence[Sequence[Tensor]], like: Tensor, width: int, offsets_E: Tensor, num_rows: int
) -> Tensor | None:
    """The bias of each grouped row of h; None if there is none.

    biases: those of gate_up and, where it is apart, of up, each of this width and of the dtype of `like`.
    """
    if not any(biases):
        return None
    no_bias = like.new_zeros(offsets_E.numel(), width)
    stacked = [torch.stack(tuple(experts(bias, 1))) if bias else no_bias for bias in biases]
    return expand([torch.cat(stacked, dim=1)], offsets_E, num_rows)
