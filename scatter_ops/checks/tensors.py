"""What tensor arguments must be; each function raises an error that names the argument.

Sizes may be symbolic while tracing: they are compared by `same_size` only, which neither specialises them nor fails on
sizes that aren't known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def per_expert(name: str, parameters: Sequence[Tensor], x: Tensor, offsets: Tensor, expert_dim: int) -> None:
    """One stacked tensor or one tensor per expert, all alike and of x's dtype and device."""
    if not parameters:
        raise ValueError(f"{name}: got an empty list, accepted is one stacked tensor or one tensor per expert")
    first = parameters[0]
    stacked = len(parameters) == 1 and first.dim() == expert_dim + 1
    if not stacked:
        dims(name, first, expert_dim)
    like(name, first, x)
    alike(name, parameters, first)
    given = first.shape[0] if stacked else len(parameters)
    same_size(name, "experts", given, offsets.shape[0], "the length of offsets")


def bias_width(name: str, bias: Sequence[Tensor], x: Tensor, offsets: Tensor, width: int) -> None:
    if bias:
        per_expert(name, bias, x, offsets, 1)
        same_size(name, "columns", bias[0].shape[-1], width, "the output width of its weight")


def weight_sizes(name: str, weight: Sequence[Tensor], x: Tensor, offsets: Tensor, transposed: bool) -> tuple[int, int]:
    """Input and output width of checked per-expert weights."""
    per_expert(name, weight, x, offsets, 2)
    rows, columns = weight[0].shape[-2:]
    return (rows, columns) if transposed else (columns, rows)


def alike(name: str, parameters: Sequence[Tensor], first: Tensor) -> None:
    shape, dtype, device = first.shape, first.dtype, first.device
    for e, p in enumerate(parameters):
        if p.shape != shape or p.dtype != dtype or p.device != device:
            raise ValueError(
                f"{name}[{e}]: got {tuple(p.shape)} {p.dtype} on {p.device}, "
                f"accepted is what {name}[0] is: {tuple(shape)} {dtype} on {device}"
            )


def rows_in(name: str, x: Tensor, order: Tensor, top_k: int, grouped: bool) -> None:
    if grouped:
        rows_of_slots(name, x, order)
    else:
        rows_of_tokens(name, x, order, top_k)


def rows_of_slots(name: str, x: Tensor, order: Tensor) -> None:
    dims(name, x, 2)
    dtype_in(name, x, FLOAT_DTYPES)
    same_size(name, "rows", x.shape[0], order.shape[0], "one per slot, the length of order")


def rows_of_tokens(name: str, x: Tensor, order: Tensor, top_k: int) -> None:
    divides_slots(order, top_k)
    dims(name, x, 2)
    dtype_in(name, x, FLOAT_DTYPES)
    torch._check_value(
        x.shape[0] * top_k == order.shape[0],
        lambda: f"{name}: got {x.shape[0]} rows, accepted is {order.shape[0] // top_k} (the length of order / top_k)",
    )


def divides_slots(order: Tensor, top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, accepted is at least 1")
    torch._check_value(
        order.shape[0] % top_k == 0,
        lambda: f"top_k: got {top_k}, accepted is a divisor of the number of slots {order.shape[0]}",
    )


def routing(x: Tensor, order: Tensor, offsets: Tensor) -> None:
    dims("order", order, 1)
    dtype_in("order", order, (torch.int32,))
    same_device("order", order, x)
    offsets_of(x, offsets)


def offsets_of(x: Tensor, offsets: Tensor) -> None:
    dims("offsets", offsets, 1)
    dtype_in("offsets", offsets, (torch.int32,))
    same_device("offsets", offsets, x)


def router_weights(topk_weights: Tensor | None, x: Tensor, order: Tensor, top_k: int) -> None:
    if topk_weights is None:
        return
    dims("topk_weights", topk_weights, 2)
    dtype_in("topk_weights", topk_weights, FLOAT_DTYPES)
    same_device("topk_weights", topk_weights, x)
    same_size("topk_weights", "columns", topk_weights.shape[1], top_k, "top_k")
    same_size("topk_weights", "elements", topk_weights.numel(), order.shape[0], "one per slot, the length of order")


def output_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, accepted are None, {_names(FLOAT_DTYPES)}")


def like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted is x's dtype {x.dtype}")
    same_device(name, tensor, x)


def dims(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, accepted is a tensor of {dims} dimensions")


def dtype_in(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted are {_names(accepted)}")


def same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, accepted is the device of the other arguments, {x.device}"
        )


def same_size(name: str, what: str, given: int, accepted: int, meaning: str) -> None:
    if type(given) is type(accepted) is int and given == accepted:
        return  # a quarter of the time of torch._check_value, which sizes that may be symbolic need
    torch._check_value(given == accepted, lambda: f"{name}: got {given} {what}, accepted is {accepted} ({meaning})")


def one_of(name: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise ValueError(f"{name}: got {given!r}, accepted are {', '.join(accepted)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
