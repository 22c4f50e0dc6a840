"""Grouped GEMM whose weights are the sum of a stack and a low-rank product: LoRA (arXiv 2106.09685) on experts.

    y = x (W_e + scale L_e R_e)^T + b_e        for each slot with its expert e; no transpose if transposed

N slots, E experts; `in` and `out` are the widths of the linear layer, r the rank. W [E, P, Q], L [E, P, r] and
R [E, r, Q], where P and Q are out and in; in and out if transposed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.grouping import accumulation_dtype
from scatter_ops.reference.linear import parallel_linear, parallel_linear_weight_grad


def adapted_linear_forward(
    x: Tensor,
    weight_EPQ: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    """y = x (W_e + scale L_e R_e)^T + b_e for each slot with its expert e. Returns [N, out] in x's dtype.

    weight [E, out, in], lhs [E, out, r], rhs [E, r, in]; if transposed [E, in, out], [E, in, r], [E, r, out] and no
    transpose in the formula. x and bias as in parallel_linear. The sum is never made of all experts: their products are
    thin, or on the CPU, where that takes less time, each expert's sum is made for its own rows.
    """
    dtype = accumulation_dtype(x.dtype)
    weight = torch.baddbmm(weight_EPQ.to(dtype), lhs_EPr.to(dtype), rhs_ErQ.to(dtype), alpha=scale)
    layout = (order_N, offsets_E, top_k, grouped_in, grouped_out)
    return parallel_linear(x.to(dtype), [weight], *layout, [b.to(dtype) for b in bias], transposed).to(x.dtype)


def adapted_linear_grads(
    x: Tensor,
    grad: Tensor,
    lhs_EPr: Tensor,
    rhs_ErQ: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of lhs and rhs; zero for an expert without tokens. One that isn't needed has shape [0].

    With G_e the gradient of W_e: scale G_e R_e^T and scale L_e^T G_e. lhs is read if need_rhs, rhs if need_lhs.
    """
    dtype = accumulation_dtype(x.dtype)
    layout = (order_N, offsets_E, top_k, grouped_in, grouped_out, transposed)
    grad_EPQ = parallel_linear_weight_grad(x.to(dtype), grad.to(dtype), *layout)
    grad_lhs = scale * grad_EPQ @ rhs_ErQ.to(dtype).mT if need_lhs else x.new_empty(0)
    grad_rhs = scale * lhs_EPr.to(dtype).mT @ grad_EPQ if need_rhs else x.new_empty(0)
    return grad_lhs.to(x.dtype), grad_rhs.to(x.dtype)
