"""parallel_linear and its gradients on CUDA. N slots, E experts, `in` and `out` the widths of the linear layer."""

from collections.abc import Sequence

from torch import Tensor

from scatter_ops.cuda.device import float64_by_reference, on_its_device
from scatter_ops.cuda.grouped_gemm import grouped_gemm
from scatter_ops.cuda.operands import Routing, Rows
from scatter_ops.cuda.parameters import expert_bias, expert_weight
from scatter_ops.cuda.weight_grad import grouped_sum, oriented_weight_grad


@float64_by_reference
@on_its_device
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
    """y = x W_e^T + b_e for each slot with its expert e: [N, out] in x's dtype. See scatter_ops.reference."""
    rows = Rows(x, 0 if grouped_in else top_k)
    routing = Routing(order_N, offsets_E)
    return grouped_gemm(
        rows, expert_weight(weight, transposed), expert_bias(bias), routing, scatter=not grouped_out, zero_unrouted=True
    )


@float64_by_reference
@on_its_device
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
    """Stacked gradient of the weights in their own layout, in x's dtype."""
    x_rows = Rows(x, 0 if grouped_in else top_k)
    grad_rows = Rows(grad.to(x.dtype), 0 if grouped_out else 1)
    return oriented_weight_grad(grad_rows, x_rows, Routing(order_N, offsets_E), transposed)


@float64_by_reference
@on_its_device
def parallel_linear_bias_grad(grad: Tensor, order_N: Tensor, offsets_E: Tensor, grouped_out: bool) -> Tensor:
    """Gradient [E, out] of the biases."""
    return grouped_sum(Rows(grad, 0 if grouped_out else 1), None, Routing(order_N, offsets_E), grad.dtype)
