"""scatter_moe::mlp: the fused expert MLP. Made of mlp_forward, which keeps h only if a gradient will read it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from registrations.library import LIBRARY, OPS, autocast, define, requires_grad

ARGUMENTS = (
    "Tensor x, Tensor topk_weights, Tensor order, Tensor offsets, Tensor[] gate_up, Tensor[] up, Tensor[] down, "
    "Tensor[] gate_up_bias, Tensor[] up_bias, Tensor[] down_bias, str activation, str layout"
)
define(
    f'mlp({ARGUMENTS}, bool transposed=False, str weight_on="output", float alpha=1.702, float limit=7.0, '
    "ScalarType? out_dtype=None) -> Tensor"
)


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
) -> Tensor:
    """The gradient of down_bias alone doesn't read h. Going below autograd at once spares its kernel a call."""
    arguments = (x, topk_weights, order, offsets, gate_up, up, down, gate_up_bias, up_bias, down_bias)
    options = (activation, layout, transposed, weight_on, alpha, limit, out_dtype)
    if not (torch.is_grad_enabled() and any(requires_grad(value) for value in arguments)):
        with torch._C._AutoDispatchBelowAutograd():
            return OPS.mlp_forward.default(*arguments, *options, False)[0]
    save_h = any(requires_grad(value) for value in arguments[:-1])
    return OPS.mlp_forward.default(*arguments, *options, save_h)[0]


LIBRARY.impl("mlp", mlp, "CompositeImplicitAutograd")


@autocast("mlp")
def mlp_autocast(cast, x, topk_weights, order, offsets, *rest):
    parameters, options = rest[:6], rest[6:]
    return cast(x), topk_weights, order, offsets, *(cast(parameter) for parameter in parameters), *options
