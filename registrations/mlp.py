"""scatter_moe::mlp: the fused expert MLP. Made of mlp_forward, which keeps only what a gradient will read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from registrations.library import LIBRARY, autocast, call, define, requires_grad
from registrations.sharding import (
    PARTIAL,
    REPLICATED,
    Placed,
    Placement,
    divisible,
    refuse,
    same_placement,
    tokens_are_sharded,
    weight_dims,
)

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
    """The gradient of down_bias alone doesn't read h. y, as large as N x D, is kept on the CPU alone (ADR-0008)."""
    arguments = (x, topk_weights, order, offsets, gate_up, up, down, gate_up_bias, up_bias, down_bias)
    options = (activation, layout, transposed, weight_on, alpha, limit, out_dtype)
    save_h = torch.is_grad_enabled() and any(requires_grad(value) for value in arguments[:-1])
    save_y = save_h and x.device.type == "cpu" and weight_on == "output" and topk_weights.requires_grad
    return call("mlp_forward", *arguments, *options, save_h, save_y)[0]


LIBRARY.impl("mlp", mlp, "CompositeImplicitAutograd")


@autocast("mlp")
def mlp_autocast(cast, x, topk_weights, order, offsets, *rest):
    parameters, options = rest[:6], rest[6:]
    return cast(x), topk_weights, order, offsets, *(cast(parameter) for parameter in parameters), *options


def mlp_division(
    x: Placed,
    topk_weights: Placed,
    order: Placed,
    offsets: Placed,
    gate_up: Sequence[Placed],
    up: Sequence[Placed],
    down: Sequence[Placed],
    gate_up_bias: Sequence[Placed],
    up_bias: Sequence[Placed],
    down_bias: Sequence[Placed],
    activation: str,
    layout: str,
    transposed: bool,
    *options,
) -> tuple[str, list[Placement]]:
    """For the rules of mlp_forward and mlp_backward: "replicated", "tokens" or "columns", and where arguments must be.

    Columns of the first projections are rows of down: no rank needs another's part of the activation. The bias of down
    is a partial sum as its result is, so that it is added once.
    """
    first = {"gate_up": gate_up, "up": up} if up else {"gate_up": gate_up}
    placements = [same_placement(name, weight) for name, weight in {**first, "down": down}.items()]
    column, _ = weight_dims(gate_up, transposed)
    _, row = weight_dims(down, transposed)
    by_columns = [*[column] * len(first), row]
    if placements not in ([REPLICATED] * len(placements), by_columns):
        raise refuse(f"{', '.join(first)}, down", placements, f"all replicated, and columns with rows, {by_columns}")
    if tokens_are_sharded(order, offsets):
        if placements == by_columns:
            raise refuse("gate_up", column, "replicated, where the tokens are sharded on this dimension of the mesh")
        divisible("topk_weights", topk_weights.shape[0], topk_weights.ranks)
        return "tokens", [0, 0, 0, PARTIAL, *[REPLICATED] * 6]
    if placements != by_columns:
        return "replicated", [REPLICATED] * 10
    if layout == "concatenated":
        raise refuse(
            "gate_up",
            f"{column} with layout 'concatenated'",
            "the layouts 'plain', 'interleaved' and 'separate': a rank needs gate and up of the same columns",
        )
    divisible("down", down[0].shape[row], down[0].ranks)
    biases = [len(bias[0].shape) - 1 if bias else REPLICATED for bias in (gate_up_bias, up_bias)]
    return "columns", [*[REPLICATED] * 4, column, column, row, *biases, PARTIAL]
