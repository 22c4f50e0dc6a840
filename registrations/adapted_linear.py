"""scatter_moe::adapted_linear: the grouped GEMM with low-rank adapters, whose sums with the weights are never stored.

On the CPU it is one operator, which may make the sum of one expert at a time. Elsewhere it is three products that have
their own derivatives, so that a compiler fuses what stands between them with its surroundings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from registrations.library import LIBRARY, OPS, autocast, call, define
from scatter_ops import checks

define(
    "adapted_linear(Tensor x, Tensor weight, Tensor lhs, Tensor rhs, Tensor order, Tensor offsets, float scale, "
    "int top_k, bool grouped_in, bool grouped_out, Tensor[] bias, bool transposed=False) -> Tensor"
)


def adapted_linear(
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
    transposed: bool = False,
) -> Tensor:
    arguments = (x, weight, lhs, rhs, order, offsets, scale, top_k, grouped_in, grouped_out, bias, transposed)
    if x.device.type == "cpu":
        return call("adapted_linear_forward", *arguments)
    checks.adapted_linear_forward(*arguments)
    return by_thin_products(*arguments)


LIBRARY.impl("adapted_linear", adapted_linear, "CompositeImplicitAutograd")


@autocast("adapted_linear")
def adapted_linear_autocast(
    cast, x, weight, lhs, rhs, order, offsets, scale, top_k, grouped_in, grouped_out, bias, transposed=False
):
    layout = (top_k, grouped_in, grouped_out)
    return *map(cast, (x, weight, lhs, rhs)), order, offsets, scale, *layout, cast(bias), transposed


def by_thin_products(
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
) -> Tensor:
    layout = (top_k, grouped_in, grouped_out)
    y = OPS.parallel_linear(x, [weight], order, offsets, *layout, bias, transposed)
    return torch.add(y, low_rank_linear(x, lhs, rhs, order, offsets, *layout, transposed), alpha=scale)


def low_rank_linear(
    x: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    grouped_in: bool,
    grouped_out: bool,
    transposed: bool,
) -> Tensor:
    """x (L_e R_e)^T for each slot. The factors may be strided views, whose copies are small."""
    first, second = (lhs, rhs) if transposed else (rhs, lhs)
    to_thin, from_thin = (top_k, grouped_in, True), (1, True, grouped_out)
    thin = OPS.parallel_linear(x, [first.contiguous()], order, offsets, *to_thin, [], transposed)
    return OPS.parallel_linear(thin, [second.contiguous()], order, offsets, *from_thin, [], transposed)
