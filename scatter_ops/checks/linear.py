"""Arguments of the grouped GEMM and its gradients."""

from collections.abc import Sequence

from torch import Tensor

from scatter_ops.checks import tensors


def parallel_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool = False,
) -> None:
    tensors.rows_in("x", x, order, top_k, grouped_in)
    tensors.routing(x, order, offsets)
    num_in, num_out = tensors.weight_sizes("weight", weight, x, offsets, transposed)
    tensors.same_size("x", "columns", x.shape[1], num_in, "the input width of weight")
    tensors.bias_width("bias", bias, x, offsets, num_out)


def parallel_linear_weight_grad(
    x: Tensor,
    grad: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool = False,
) -> None:
    tensors.rows_in("x", x, order, top_k, grouped_in)
    tensors.rows_of_slots("grad", grad, order)
    tensors.like("grad", grad, x)
    tensors.routing(x, order, offsets)


def parallel_linear_bias_grad(grad: Tensor, order: Tensor, offsets: Tensor, grouped_out: bool) -> None:
    tensors.rows_of_slots("grad", grad, order)
    tensors.routing(grad, order, offsets)
