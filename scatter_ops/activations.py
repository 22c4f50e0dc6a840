"""Activations of a (gated) expert and their derivatives, written as formulas: the specification of `mlp`.

A = act(gate) * up for gated experts, A = act(gate) for plain ones (up is None). `clamped_swiglu` (gpt-oss) is gated
only: g = min(gate, limit), u = clamp(up, -limit, limit), A = (u + 1) * g * sigmoid(alpha * g).

F is the expert width; h holds gate and up in the column order of the parameters, which `layout` names:
plain [F], concatenated and separate [gate F | up F], interleaved [gate_0, up_0, gate_1, up_1, ...].
"""

import math

import torch
from torch import Tensor

CLAMP_PASSES_AT_ITS_LIMITS = torch.__version__ < "2.14"
"""Whether gradients pass a clamp of PyTorch's whose input is one of its limits."""
LAYOUTS = ("plain", "concatenated", "interleaved", "separate")
GATED_ONLY = ("clamped_swiglu",)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", *GATED_ONLY)


def split(h: Tensor, layout: str) -> tuple[Tensor, Tensor | None]:
    """Gate and up (None for a plain expert) as views of h."""
    if layout == "plain":
        return h, None
    if layout == "interleaved":
        return h[..., 0::2], h[..., 1::2]
    gate, up = h.chunk(2, -1)
    return gate, up


def join(gate: Tensor, up: Tensor | None, layout: str) -> Tensor:
    """The inverse of `split`."""
    if up is None:
        return gate
    if layout == "interleaved":
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up), dim=-1)


def activate(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    if activation == "clamped_swiglu":
        assert up is not None
        g = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * g * torch.sigmoid(alpha * g)
    value, _ = _value_and_slope(gate, activation)
    return value if up is None else value * up


def activate_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up (None for a plain expert), given the gradient of A."""
    if activation == "clamped_swiglu":
        assert up is not None
        g = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(alpha * g)
        slope = sigmoid * (1 + alpha * g * (1 - sigmoid)) * within(gate, limit)
        return grad * (up.clamp(-limit, limit) + 1) * slope, grad * g * sigmoid * within(up.abs(), limit)
    value, slope = _value_and_slope(gate, activation)
    return (grad * slope, None) if up is None else (grad * up * slope, grad * value)


def within(x: Tensor, limit: float) -> Tensor:
    """Where gradients pass a clamp of x to at most this limit."""
    return x <= limit if CLAMP_PASSES_AT_ITS_LIMITS else x < limit


def _value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        scale = math.sqrt(2 / math.pi)
        tanh = torch.tanh(scale * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * x * x)
        return 0.5 * x * (1 + tanh), slope
    if activation == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    if activation == "relu2":
        return x.relu().square(), 2 * x.relu()
    raise ValueError(f"activation: got {activation!r}, accepted are {', '.join(ACTIVATIONS)}")
