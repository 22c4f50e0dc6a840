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


def adapted_linear_forward(
    x: Tensor,
    weight: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    order: Tensor,
    offsets: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    bias: Sequence[Tensor],
    transposed: bool,
) -> None:
    tensors.dims("weight", weight, 3)
    parallel_linear(x, [weight], order, offsets, top_k, grouped_in, grouped_out, bias, transposed)
    _factors(x, lhs, rhs, offsets, weight.shape[1], weight.shape[2], "weight")


def adapted_linear_grads(
    x: Tensor,
    grad: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    order: Tensor,
    offsets: Tensor,
    scale: float,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
    need_lhs: bool,
    need_rhs: bool,
) -> None:
    parallel_linear_weight_grad(x, grad, order, offsets, top_k, grouped_in, grouped_out, transposed)
    rows, columns = (x.shape[1], grad.shape[1]) if transposed else (grad.shape[1], x.shape[1])
    _factors(x, lhs, rhs, offsets, rows, columns, "the gradient of the weights")


def _factors(x: Tensor, lhs: Tensor, rhs: Tensor, offsets: Tensor, rows: int, columns: int, whose: str) -> None:
    for name, factor in (("lhs", lhs), ("rhs", rhs)):
        tensors.dims(name, factor, 3)
        tensors.per_expert(name, [factor], x, offsets, 2)
    tensors.same_size("lhs", "rows", lhs.shape[1], rows, f"the rows of {whose}")
    tensors.same_size("rhs", "columns", rhs.shape[2], columns, f"the columns of {whose}")
    tensors.same_size("rhs", "rows", rhs.shape[1], lhs.shape[2], "the columns of lhs")
