"""Activations of a (gated) expert by PyTorch's fused CPU kernels; the formulas are in `scatter_ops.activations`.

Everything is done in blocks of rows that stay in the cache, in the accumulation dtype.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 2**18

_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}
_ACTIVATE_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": lambda grad, x: F.relu(x).mul_(grad).mul_(2),
}


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are small enough to stay in the cache."""
    step = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def activate(gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float) -> Tensor:
    if activation == "clamped_swiglu":
        assert up is not None
        g = gate.clamp(max=limit)
        return torch.sigmoid(alpha * g).mul_(g).mul_(up.clamp(-limit, limit).add_(1))
    value = _ACTIVATE[activation](gate)
    return value if up is None else value.mul_(up)


def activate_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, activation: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A and the gradients of gate and up."""
    if activation == "clamped_swiglu":
        assert up is not None
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
        sigmoid = torch.sigmoid(alpha * g)
        value = g * sigmoid
        slope = sigmoid.add_(value * alpha * (1 - sigmoid)).mul_(gate <= limit)
        return value * u, (grad * u).mul_(slope), (grad * value).mul_(up.abs() <= limit)
    value, backward = _ACTIVATE[activation](gate), _ACTIVATE_BACKWARD[activation]
    if up is None:
        return value, backward(grad, gate), None
    return value * up, backward(grad * up, gate), grad * value
