"""Activations of a (gated) expert by PyTorch's fused CPU kernels; the formulas are in `scatter_ops.activations`.

Both passes are computed in the dtype of h, or in the accumulation dtype where the router weight is on the input. In
half precision PyTorch's kernels compute in fp32 and round each result, as they do in a loop over the experts and in its
autograd: gradients are as exact as theirs. With conversions, to round only once, it takes longer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scatter_ops.activations import split, within
from scatter_ops.cpu.parts import blocks
from scatter_ops.grouping import accumulation_dtype

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}
ATEN = torch.ops.aten
_ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # the last argument is written
    "silu": lambda grad, x, out: ATEN.silu_backward.grad_input(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: ATEN.gelu_backward.grad_input(grad, x, grad_input=out),
    "gelu_tanh": lambda grad, x, out: ATEN.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out),
    "relu": lambda grad, x, out: ATEN.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    "relu2": lambda grad, x, out: torch.mul(F.relu(x).mul_(2), grad, out=out),
}


def pre_activation(h: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """h, or s h + b in the accumulation dtype, that of s, where the router weight is on the input."""
    if scale is not None:
        h = h * scale
    return h if bias is None else h.add_(bias)


def gate_and_up(pre: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    gate, up = split(pre, layout)
    return gate.contiguous() if layout == "interleaved" else gate, up  # every second column takes several times longer


def activated(
    h_NH: Tensor,
    scale_N1: Tensor | None,
    bias_NH: Tensor | None,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """A in the dtype of h. scale, bias: see `pre_activation`."""
    if scale_N1 is None:
        return activate(*gate_and_up(h_NH, layout), activation, alpha, limit)
    values = [
        activate(*gate_and_up(pre_activation(h, scale, bias), layout), activation, alpha, limit).to(h_NH.dtype)
        for h, scale, bias in blocks(h_NH, scale_N1, bias_NH)
    ]
    return values[0] if len(values) == 1 else torch.cat(values)


def activate(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    if activation == "clamped_swiglu":
        assert up is not None
        g = gate.clamp(max=limit)
        return torch.sigmoid(alpha * g).mul_(g).mul_(up.clamp(-limit, limit).add_(1))
    value = _ACTIVATE[activation](gate)
    return value if up is None else value.mul_(up)


def activate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    alpha: float,
    limit: float,
    out_gate: Tensor,
    out_up: Tensor | None,
) -> Tensor:
    """Write the gradients of gate and up, which may take their places, given the gradient of A; returns A."""
    if activation == "clamped_swiglu":
        assert up is not None
        # No kernel of PyTorch's has this derivative, and in half precision its formula would lose more than autograd.
        grad, gate, up = (tensor.to(accumulation_dtype(tensor.dtype)) for tensor in (grad, gate, up))
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
        sigmoid = torch.sigmoid(alpha * g)
        value = g * sigmoid
        slope = sigmoid.add_(alpha * value * (1 - sigmoid)).mul_(within(gate, limit))
        torch.mul(grad * u, slope, out=out_gate)
        torch.mul(grad * value, within(up.abs(), limit), out=out_up)
        return value.mul_(u)
    value, backward = _ACTIVATE[activation](gate), _ACTIVATE_BACKWARD[activation]
    if up is None:
        backward(grad, gate, out_gate)
        return value
    grad_value, a = grad * up, value * up
    torch.mul(grad, value, out=out_up)
    backward(grad_value, gate, out_gate)
    return a
