"""Activations of a (gated) expert by PyTorch's fused CPU kernels; the formulas are in `scatter_ops.activations`.

Everything is done in blocks of rows that stay in the cache, in the accumulation dtype.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**17

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}
ATEN = torch.ops.aten
_ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # the last argument is written
    "silu": lambda grad, x, out: ATEN.silu_backward(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: ATEN.gelu_backward(grad, x, grad_input=out),
    "gelu_tanh": lambda grad, x, out: ATEN.gelu_backward(grad, x, approximate="tanh", grad_input=out),
    "relu": lambda grad, x, out: ATEN.threshold_backward(grad, x, 0, grad_input=out),
    "relu2": lambda grad, x, out: torch.mul(F.relu(x).mul_(2), grad, out=out),
}


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are small enough to stay in the cache."""
    step = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def activate(
    gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float, out: Tensor | None = None
) -> Tensor:
    """A, rounded to the dtype of `out` if it is given."""
    if activation == "clamped_swiglu":
        assert up is not None
        g = gate.clamp(max=limit)
        return torch.mul(torch.sigmoid(alpha * g).mul_(g), up.clamp(-limit, limit).add_(1), out=out)
    value = _ACTIVATE[activation](gate)
    if up is not None:
        return torch.mul(value, up, out=out)
    return value if out is None else out.copy_(value)


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
    """Write the gradients of gate and up, given the gradient of A, which is overwritten; returns A."""
    if activation == "clamped_swiglu":
        assert up is not None
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
        sigmoid = torch.sigmoid(alpha * g)
        value = g * sigmoid
        slope = sigmoid.add_(alpha * value * (1 - sigmoid)).mul_(gate <= limit)
        torch.mul(grad * u, slope, out=out_gate)
        torch.mul(grad * value, up.abs() <= limit, out=out_up)
        return value.mul_(u)
    value, backward = _ACTIVATE[activation](gate), _ACTIVATE_BACKWARD[activation]
    if up is None:
        backward(grad, gate, out_gate)
        return value
    torch.mul(grad, value, out=out_up)
    backward(grad.mul_(up), gate, out_gate)
    return value.mul_(up)
