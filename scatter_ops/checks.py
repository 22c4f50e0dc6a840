"""Errors for wrong arguments of the operators, each naming the argument, what was given and what is accepted.

Called before any implementation and while tracing. One function per operator, with the operator's own arguments;
raises TypeError for a wrong dtype and ValueError for anything else. Nothing here reads a tensor's values. Sizes may be
symbolic: they are compared by `_same_size` only, so that tracing neither specialises them nor fails on unknown ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.activations import ACTIVATIONS, GATED_ONLY, LAYOUTS

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)
WEIGHT_ON = ("output", "input")
MAX_SLOTS = 2**31 - 1


def route(topk_ids: Tensor, num_experts: int) -> None:
    _dims("topk_ids", topk_ids, 2)
    _dtype("topk_ids", topk_ids, ID_DTYPES)
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, accepted is at least 1")
    torch._check_value(
        topk_ids.numel() <= MAX_SLOTS,
        lambda: f"topk_ids: got {topk_ids.numel()} slots, accepted are at most {MAX_SLOTS} (order is int32)",
    )


def dispatch(x: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> None:
    _rows_of_tokens("x", x, order, top_k)
    _routing(x, order, offsets)


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
    _rows_in("x", x, order, top_k, grouped_in)
    _routing(x, order, offsets)
    num_in, num_out = weight_sizes("weight", weight, x, offsets, transposed)
    _same_size("x", "columns", x.shape[1], num_in, "the input width of weight")
    _bias("bias", bias, x, offsets, num_out)


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
    _rows_in("x", x, order, top_k, grouped_in)
    _rows_of_slots("grad", grad, order)
    _like("grad", grad, x)
    _routing(x, order, offsets)


def parallel_linear_bias_grad(grad: Tensor, order: Tensor, offsets: Tensor, grouped_out: bool) -> None:
    _rows_of_slots("grad", grad, order)
    _routing(grad, order, offsets)


def combine(
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    out_dtype: torch.dtype | None = None,
) -> None:
    _rows_of_slots("y", y, order)
    _top_k(order, top_k)
    _routing(y, order, offsets)
    _topk_weights(topk_weights, y, order, top_k)
    _out_dtype(out_dtype)


def combine_backward(
    grad_out: Tensor,
    y: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    need_y: bool,
    need_weights: bool,
) -> None:
    _rows_of_tokens("grad_out", grad_out, order, top_k)
    _routing(grad_out, order, offsets)
    _topk_weights(topk_weights, grad_out, order, top_k)
    _dtype("y", y, FLOAT_DTYPES)
    if need_weights and topk_weights is None:
        raise ValueError("need_weights: got True, accepted is False where topk_weights is None")
    if need_weights:
        _rows_of_slots("y", y, order)
        _same_size("y", "columns", y.shape[1], grad_out.shape[1], "the columns of grad_out")


def expand(param: Sequence[Tensor], offsets: Tensor, num_rows: int) -> None:
    if not param:
        raise ValueError("param: got an empty list, accepted is one tensor [E, *rest] or one tensor [*rest] per expert")
    first = param[0]
    if first.dim() == 0 and len(param) == 1:
        raise ValueError("param: got one tensor without dimensions, accepted is one tensor [E, *rest]")
    _offsets(first, offsets)
    _alike("param", param, first)
    given = first.shape[0] if len(param) == 1 else len(param)
    _same_size("param", "experts", given, offsets.shape[0], "the length of offsets")


def expand_backward(grad: Tensor, offsets: Tensor) -> None:
    _dtype("grad", grad, FLOAT_DTYPES)
    if grad.dim() == 0:
        raise ValueError("grad: got a tensor without dimensions, accepted is [num_rows, *rest]")
    _offsets(grad, offsets)


def mlp(
    x: Tensor,
    topk_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    layout: str,
    transposed: bool = False,
    weight_on: str = "output",
    alpha: float = 1.702,
    limit: float = 7.0,
    out_dtype: torch.dtype | None = None,
) -> None:
    _mlp_options(activation, layout, weight_on)
    _out_dtype(out_dtype)
    top_k = _mlp_routing(topk_weights, order, offsets, x)
    _rows_of_tokens("x", x, order, top_k)
    _mlp_parameters(x, offsets, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed)
    model_width, _ = weight_sizes("gate_up", gate_up, x, offsets, transposed)
    _same_size("x", "columns", x.shape[1], model_width, "the input width of gate_up")


def mlp_forward(*arguments) -> None:
    """Arguments of `mlp`, then save_h."""
    mlp(*arguments[:-1])


def mlp_backward(
    grad_out: Tensor, h: Tensor, x: Tensor, topk_weights: Tensor, order: Tensor, offsets: Tensor, *rest
) -> None:
    """grad_out and h, arguments of `mlp`, then needs."""
    gate_up, up, down, gate_up_bias, up_bias, down_bias, activation, layout, transposed, weight_on, *_, needs = rest
    _mlp_options(activation, layout, weight_on)
    _rows_of_tokens("grad_out", grad_out, order, _mlp_routing(topk_weights, order, offsets, x))
    _mlp_parameters(x, offsets, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed)
    if len(needs) != 8:
        raise ValueError(f"needs: got {len(needs)} flags, accepted are 8, one per gradient")
    if any(needs[:7]):
        _rows_of_slots("h", h, order)
    if needs[2] or needs[3]:
        _rows_of_tokens("x", x, order, topk_weights.shape[1])


def weight_sizes(name: str, weight: Sequence[Tensor], x: Tensor, offsets: Tensor, transposed: bool) -> tuple[int, int]:
    """Input and output width of checked per-expert weights."""
    _per_expert(name, weight, x, offsets, 2)
    rows, columns = weight[0].shape[-2:]
    return (rows, columns) if transposed else (columns, rows)


def _mlp_options(activation: str, layout: str, weight_on: str) -> None:
    _one_of("activation", activation, ACTIVATIONS)
    _one_of("layout", layout, LAYOUTS)
    _one_of("weight_on", weight_on, WEIGHT_ON)
    if layout == "plain" and activation in GATED_ONLY:
        raise ValueError(
            f"layout: got 'plain' with activation {activation!r}, accepted are the gated layouts {LAYOUTS[1:]}"
        )


def _mlp_routing(topk_weights: Tensor, order: Tensor, offsets: Tensor, x: Tensor) -> int:
    """Checks them and returns the number of experts per token."""
    _dtype("x", x, FLOAT_DTYPES)
    _routing(x, order, offsets)
    _dims("topk_weights", topk_weights, 2)
    top_k = topk_weights.shape[1]
    _topk_weights(topk_weights, x, order, top_k)
    return top_k


def _mlp_parameters(
    x: Tensor,
    offsets: Tensor,
    gate_up: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_up_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    layout: str,
    transposed: bool,
) -> None:
    model_width, gate_up_width = weight_sizes("gate_up", gate_up, x, offsets, transposed)
    expert_width, out_width = weight_sizes("down", down, x, offsets, transposed)
    factor = 2 if layout in ("concatenated", "interleaved") else 1
    _same_size("gate_up", "output width", gate_up_width, factor * expert_width, f"{factor} x the input width of down")
    _same_size("down", "output width", out_width, model_width, "the input width of gate_up")
    if (layout == "separate") != bool(up):
        raise ValueError(
            f"up: got {len(up)} tensors with layout {layout!r}, accepted is a list that is empty unless 'separate'"
        )
    if up:
        up_sizes = weight_sizes("up", up, x, offsets, transposed)
        _same_size("up", "input width", up_sizes[0], model_width, "the input width of gate_up")
        _same_size("up", "output width", up_sizes[1], expert_width, "the input width of down")
    if up_bias and not up:
        raise ValueError(f"up_bias: got {len(up_bias)} tensors with layout {layout!r}, accepted is an empty list")
    _bias("gate_up_bias", gate_up_bias, x, offsets, gate_up_width)
    _bias("up_bias", up_bias, x, offsets, expert_width)
    _bias("down_bias", down_bias, x, offsets, out_width)


def _bias(name: str, bias: Sequence[Tensor], x: Tensor, offsets: Tensor, width: int) -> None:
    if bias:
        _per_expert(name, bias, x, offsets, 1)
        _same_size(name, "columns", bias[0].shape[-1], width, "the output width of its weight")


def _per_expert(name: str, parameters: Sequence[Tensor], x: Tensor, offsets: Tensor, expert_dim: int) -> None:
    """One stacked tensor or one tensor per expert, all alike and of x's dtype and device."""
    if not parameters:
        raise ValueError(f"{name}: got an empty list, accepted is one stacked tensor or one tensor per expert")
    first = parameters[0]
    stacked = len(parameters) == 1 and first.dim() == expert_dim + 1
    if not stacked:
        _dims(name, first, expert_dim)
    _like(name, first, x)
    _alike(name, parameters, first)
    given = first.shape[0] if stacked else len(parameters)
    _same_size(name, "experts", given, offsets.shape[0], "the length of offsets")


def _alike(name: str, parameters: Sequence[Tensor], first: Tensor) -> None:
    shape, dtype, device = first.shape, first.dtype, first.device
    for e, p in enumerate(parameters):
        if p.shape != shape or p.dtype != dtype or p.device != device:
            raise ValueError(
                f"{name}[{e}]: got {tuple(p.shape)} {p.dtype} on {p.device}, "
                f"accepted is what {name}[0] is: {tuple(shape)} {dtype} on {device}"
            )


def _rows_in(name: str, x: Tensor, order: Tensor, top_k: int, grouped: bool) -> None:
    if grouped:
        _rows_of_slots(name, x, order)
    else:
        _rows_of_tokens(name, x, order, top_k)


def _rows_of_slots(name: str, x: Tensor, order: Tensor) -> None:
    _dims(name, x, 2)
    _dtype(name, x, FLOAT_DTYPES)
    _same_size(name, "rows", x.shape[0], order.shape[0], "one per slot, the length of order")


def _rows_of_tokens(name: str, x: Tensor, order: Tensor, top_k: int) -> None:
    _top_k(order, top_k)
    _dims(name, x, 2)
    _dtype(name, x, FLOAT_DTYPES)
    _same_size(name, "rows", x.shape[0] * top_k, order.shape[0], "the length of order, once multiplied by top_k")


def _top_k(order: Tensor, top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, accepted is at least 1")
    torch._check_value(
        order.shape[0] % top_k == 0,
        lambda: f"top_k: got {top_k}, accepted is a divisor of the number of slots {order.shape[0]}",
    )


def _routing(x: Tensor, order: Tensor, offsets: Tensor) -> None:
    _dims("order", order, 1)
    _dtype("order", order, (torch.int32,))
    _device("order", order, x)
    _offsets(x, offsets)


def _offsets(x: Tensor, offsets: Tensor) -> None:
    _dims("offsets", offsets, 1)
    _dtype("offsets", offsets, (torch.int32,))
    _device("offsets", offsets, x)


def _topk_weights(topk_weights: Tensor | None, x: Tensor, order: Tensor, top_k: int) -> None:
    if topk_weights is None:
        return
    _dims("topk_weights", topk_weights, 2)
    _dtype("topk_weights", topk_weights, FLOAT_DTYPES)
    _device("topk_weights", topk_weights, x)
    _same_size("topk_weights", "columns", topk_weights.shape[1], top_k, "top_k")
    _same_size("topk_weights", "elements", topk_weights.numel(), order.shape[0], "one per slot, the length of order")


def _out_dtype(out_dtype: torch.dtype | None) -> None:
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, accepted are None, {_names(FLOAT_DTYPES)}")


def _like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted is x's dtype {x.dtype}")
    _device(name, tensor, x)


def _dims(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, accepted is a tensor of {dims} dimensions")


def _dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: got {tensor.dtype}, accepted are {_names(accepted)}")


def _device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, accepted is the device of the other arguments, {x.device}"
        )


def _same_size(name: str, what: str, given: int, accepted: int, meaning: str) -> None:
    torch._check_value(given == accepted, lambda: f"{name}: got {given} {what}, accepted is {accepted} ({meaning})")


def _one_of(name: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise ValueError(f"{name}: got {given!r}, accepted are {', '.join(accepted)}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
