"""Arguments of the fused expert MLP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scatter_ops.activations import ACTIVATIONS, GATED_ONLY, LAYOUTS
from scatter_ops.checks import tensors

WEIGHT_ON = ("output", "input")


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
    mlp_options(activation, layout, weight_on)
    tensors.output_dtype(out_dtype)
    top_k = _routing(topk_weights, order, offsets, x)
    tensors.rows_of_tokens("x", x, order, top_k)
    biases = (gate_up_bias, up_bias, down_bias)
    model_width = _parameters(x, offsets, gate_up, up, down, *biases, layout, transposed)
    tensors.same_size("x", "columns", x.shape[1], model_width, "the input width of gate_up")


def mlp_forward(*arguments) -> None:
    """Arguments of `mlp`, then save_h and save_y."""
    mlp(*arguments[:-2])


def mlp_backward(
    grad_out: Tensor,
    h: Tensor,
    y: Tensor | None,
    x: Tensor,
    topk_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    *rest,
) -> None:
    """grad_out, h and y, arguments of `mlp`, then needs."""
    gate_up, up, down, gate_up_bias, up_bias, down_bias, activation, layout, transposed, weight_on, *_, needs = rest
    mlp_options(activation, layout, weight_on)
    tensors.rows_of_tokens("grad_out", grad_out, order, _routing(topk_weights, order, offsets, x))
    _parameters(x, offsets, gate_up, up, down, gate_up_bias, up_bias, down_bias, layout, transposed)
    if len(needs) != 8:
        raise ValueError(f"needs: got {len(needs)} flags, accepted are 8, one per gradient")
    if any(needs[:7]):
        tensors.rows_of_slots("h", h, order)
    if y is not None:
        tensors.rows_of_slots("y", y, order)
    if needs[2] or needs[3]:
        tensors.rows_of_tokens("x", x, order, topk_weights.shape[1])


def mlp_options(activation: str, layout: str, weight_on: str) -> None:
    """The arguments that are words."""
    tensors.one_of("activation", activation, ACTIVATIONS)
    tensors.one_of("layout", layout, LAYOUTS)
    tensors.one_of("weight_on", weight_on, WEIGHT_ON)
    if layout == "plain" and activation in GATED_ONLY:
        raise ValueError(
            f"layout: got 'plain' with activation {activation!r}, accepted are the gated layouts {LAYOUTS[1:]}"
        )


def _routing(topk_weights: Tensor, order: Tensor, offsets: Tensor, x: Tensor) -> int:
    """Checks them and returns the number of experts per token."""
    tensors.dtype_in("x", x, tensors.FLOAT_DTYPES)
    tensors.routing(x, order, offsets)
    tensors.dims("topk_weights", topk_weights, 2)
    top_k = topk_weights.shape[1]
    tensors.router_weights(topk_weights, x, order, top_k)
    return top_k


def _parameters(
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
) -> int:
    """Checks them and returns the model width."""
    model_width, gate_up_width = tensors.weight_sizes("gate_up", gate_up, x, offsets, transposed)
    expert_width, out_width = tensors.weight_sizes("down", down, x, offsets, transposed)
    factor = 2 if layout in ("concatenated", "interleaved") else 1
    tensors.same_size(
        "gate_up", "output width", gate_up_width, factor * expert_width, f"{factor} x the input width of down"
    )
    tensors.same_size("down", "output width", out_width, model_width, "the input width of gate_up")
    if (layout == "separate") != bool(up):
        raise ValueError(
            f"up: got {len(up)} tensors with layout {layout!r}, accepted is a list that is empty unless 'separate'"
        )
    if up:
        up_sizes = tensors.weight_sizes("up", up, x, offsets, transposed)
        tensors.same_size("up", "input width", up_sizes[0], model_width, "the input width of gate_up")
        tensors.same_size("up", "output width", up_sizes[1], expert_width, "the input width of down")
    if up_bias and not up:
        raise ValueError(f"up_bias: got {len(up_bias)} tensors with layout {layout!r}, accepted is an empty list")
    tensors.bias_width("gate_up_bias", gate_up_bias, x, offsets, gate_up_width)
    tensors.bias_width("up_bias", up_bias, x, offsets, expert_width)
    tensors.bias_width("down_bias", down_bias, x, offsets, out_width)
    return model_width
