"""The fused expert MLP on the CPU; formulas and roundings are those of `scatter_ops.reference.mlp`.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h (F, gated 2F).
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from scatter_ops.activations import split
from scatter_ops.cpu.activations import activate, blocks
from scatter_ops.cpu.linear import grouped_linear
from scatter_ops.cpu.routing import expand, slot_rows, sum_slots
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
    groups = Groups(offsets_E, order_N.numel())
    rows_ND = x_TD.index_select(0, order_N // top_k)
    if up:
        width = gate_up[0].shape[-1 if transposed else -2]
        h_NH = x_TD.new_empty(order_N.numel(), 2 * width)
        grouped_linear(rows_ND, gate_up, groups, [] if on_input else gate_up_bias, transposed, out=h_NH[:, :width])
        grouped_linear(rows_ND, up, groups, [] if on_input else up_bias, transposed, out=h_NH[:, width:])
    else:
        h_NH = grouped_linear(rows_ND, gate_up, groups, [] if on_input else gate_up_bias, transposed)
    biases = (gate_up_bias, up_bias) if up else (gate_up_bias,)
    pre = PreActivation(h_NH, topk_weights_TK, order_N, offsets_E, biases, layout, on_input)
    a_NF = x_TD.new_empty(order_N.numel(), down[0].shape[-2 if transposed else -1])
    for block in blocks(h_NH):
        activate(*pre[block], activation, alpha, limit, out=a_NF[block])
    y_ND = grouped_linear(a_NF, down, groups, down_bias, transposed)
    scale_TK = None if on_input else topk_weights_TK
    out_TD = sum_slots(y_ND, scale_TK, slot_rows(order_N), groups.num_valid, top_k, out_dtype)
    return out_TD, h_NH if save_h else h_NH.new_empty(0)


class PreActivation:
    """What is activated, by blocks of rows in the accumulation dtype: h, or s h + b with the weight on the input."""

    def __init__(
        self,
        h_NH: Tensor,
        topk_weights_TK: Tensor,
        order_N: Tensor,
        offsets_E: Tensor,
        biases: Sequence[Sequence[Tensor]],
        layout: str,
        on_input: bool,
    ) -> None:
        """biases: those of gate_up and, where it is apart, of up."""
        self.h_NH, self.layout, self.on_input, self.bias_NH = h_NH, layout, on_input, None
        self.topk_weights_TK, self.order_N = topk_weights_TK, order_N
        self.dtype = accumulation_dtype(h_NH.dtype)
        if on_input and any(biases):
            no_bias = h_NH.new_zeros(offsets_E.numel(), h_NH.shape[1] // len(biases))
            stacked = [torch.stack(tuple(experts(bias, 1))) if bias else no_bias for bias in biases]
            self.bias_NH = expand([torch.cat(stacked, dim=1)], offsets_E, h_NH.shape[0])

    @cached_property
    def scale_N1(self) -> Tensor:
        """The router weight of each grouped row."""
        return self.topk_weights_TK.reshape(-1, 1).index_select(0, self.order_N).to(self.dtype)

    def __getitem__(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """Gate and up. PyTorch's activations take several times longer on a gate that is every second column."""
        pre = self.h_NH[block].to(self.dtype)
        if self.on_input:
            pre = pre * self.scale_N1[block]
        if self.bias_NH is not None:
            pre.add_(self.bias_NH[block])
        gate, up = split(pre, self.layout)
        return gate.contiguous() if self.layout == "interleaved" else gate, up
