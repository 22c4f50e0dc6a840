"""The fused expert MLP on the CPU; formulas and roundings are those of `scatter_ops.reference.mlp`.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cpu.activations import activated
from scatter_ops.cpu.linear import grouped_linear
from scatter_ops.cpu.parts import parts
from scatter_ops.cpu.routing import combine_grouped, expand, token_rows, zero_sentinels
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
) -> tuple[Tensor, Tensor]:
    top_k, on_input = topk_weights_TK.shape[1], weight_on == "input"
    groups = Groups.read(offsets_E, order_N.numel())
    rows_ND, y_ND = token_rows(x_TD, order_N, top_k), x_TD.new_empty(order_N.numel(), x_TD.shape[1])
    width = gate_up[0].shape[-1 if transposed else -2]
    h_NH = x_TD.new_empty(order_N.numel(), 2 * width if up else width) if save_h or up else None
    scale_N1 = slot_weights(topk_weights_TK, order_N, accumulation_dtype(x_TD.dtype)) if on_input else None
    bias_NH, biases = None, (gate_up_bias, up_bias) if up else (gate_up_bias,)
    if on_input:
        bias_NH = projection_bias(biases, x_TD, width, offsets_E, order_N.numel())
        gate_up_bias = up_bias = ()
    for part, rows, h, scale, bias, y in parts(groups, width, rows_ND, h_NH, scale_N1, bias_NH, y_ND):
        if up:
            grouped_linear(rows, gate_up, part, gate_up_bias, transposed, out=h[:, :width])
            grouped_linear(rows, up, part, up_bias, transposed, out=h[:, width:])
        else:
            h = grouped_linear(rows, gate_up, part, gate_up_bias, transposed, out=h)
        a = activated(h, scale, bias, layout, activation, alpha, limit)
        grouped_linear(a, down, part, down_bias, transposed, out=y)
    scale_TK = None if on_input else topk_weights_TK
    out_TD = combine_grouped(y_ND, scale_TK, order_N, groups.num_valid, top_k, out_dtype)
    if h_NH is None or not save_h:
        return out_TD, x_TD.new_empty(0)
    return out_TD, zero_sentinels(h_NH, groups.num_valid)


def slot_weights(topk_weights_TK: Tensor, order_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The router weight of each grouped row, [N, 1]."""
    return topk_weights_TK.reshape(-1, 1).index_select(0, order_N).to(dtype)


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
