"""Grouped GEMM over the rows of each expert: ParallelLinear of ScatterMoE (arXiv 2403.08245) and its gradients.

N slots, E experts; `in` and `out` are the widths of the linear layer. Weights are one tensor [E, out, in] or E tensors
[out, in]; [E, in, out] or [in, out] if transposed.
"""

from collections.abc import Sequence

from torch import Tensor

from scatter_ops.grouping import accumulation_dtype, experts, segments
from scatter_ops.reference.routing import expand_backward


def parallel_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> Tensor:
    """y = x W_e^T + b_e for each slot with its expert e. Returns [N, out] in x's dtype.

    x: [N, in] if grouped_in, else [N // top_k, in] and slot s reads row s // top_k.
    Source: ParallelLinear of ScatterMoE (arXiv 2403.08245).
    """
    dtype = accumulation_dtype(x.dtype)
    weights = [w if transposed else w.t() for w in experts(weight, 2)]
    biases = experts(bias, 1)
    y = x.new_zeros(order_N.numel(), weights[0].shape[1])
    for e, start, end in segments(offsets_E):
        slots = order_N[start:end].long()
        rows = x[start:end] if grouped_in else x[slots // top_k]
        product = rows.to(dtype) @ weights[e].to(dtype)
        if bias:
            product += biases[e].to(dtype)
        y[slice(start, end) if grouped_out else slots] = product.to(x.dtype)
    return y


def parallel_linear_weight_grad(
    x: Tensor,
    grad: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool = False,
) -> Tensor:
    """Stacked gradient of the weights in their own layout and in x's dtype; zero for an expert without tokens."""
    dtype = accumulation_dtype(x.dtype)
    dw_Eio = x.new_zeros(offsets_E.numel(), x.shape[1], grad.shape[1])
    for e, start, end in segments(offsets_E):
        slots = order_N[start:end].long()
        rows = x[start:end] if grouped_in else x[slots // top_k]
        grad_rows = grad[start:end] if grouped_out else grad[slots]
        dw_Eio[e] = (rows.to(dtype).t() @ grad_rows.to(dtype)).to(x.dtype)
    return dw_Eio if transposed else dw_Eio.transpose(1, 2).contiguous()


def parallel_linear_bias_grad(grad: Tensor, order_N: Tensor, offsets_E: Tensor, grouped_out: bool) -> Tensor:
    """Gradient [E, out] of the biases; zero for an expert without tokens."""
    return expand_backward(grad if grouped_out else grad[order_N.long()], offsets_E)
