"""mlp_forward on CUDA: gate-up GEMM with the activation in its epilogue, down GEMM, combine.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width, H columns of h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.cuda.device import float64_by_reference, on_its_device
from scatter_ops.cuda.glu import Glu, gate_up_weight
from scatter_ops.cuda.glu_forward import glu_forward
from scatter_ops.cuda.grouped_gemm import grouped_gemm
from scatter_ops.cuda.operands import Routing, Rows
from scatter_ops.cuda.parameters import expert_bias, expert_weight
from scatter_ops.cuda.rows import combine_rows


@float64_by_reference
@on_its_device
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
    routing = Routing(order_N, offsets_E)
    biases = expert_bias(gate_up_bias), expert_bias(up_bias)
    on_input = weight_on == "input"
    glu = Glu(routing, topk_weights_TK.contiguous(), *biases, activation, layout, on_input, alpha, limit)
    weight = gate_up_weight(gate_up, up, layout, transposed)
    a_NF, h = glu_forward(Rows(x_TD, glu.top_k), weight, glu, save_h)
    y_ND = grouped_gemm(
        Rows(a_NF, 0),
        expert_weight(down, transposed),
        expert_bias(down_bias),
        routing,
        scatter=False,
        zero_unrouted=save_y,
    )
    inverse_N = routing.inverse_N if routing.num_slots else order_N
    weights_TK = None if on_input else glu.topk_weights
    out_TD = combine_rows(y_ND, weights_TK, inverse_N, glu.top_k, True, out_dtype or x_TD.dtype)
    return out_TD, h, y_ND if save_y else x_TD.new_empty(0)
