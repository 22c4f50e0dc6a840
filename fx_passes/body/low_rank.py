"""An expert's weight that was made of a frozen one and two thin ones: `torch.baddbmm(W, lhs, rhs, alpha=scale)`.

    x (W + s L R)^T = x W^T + s (x R^T) L^T        the sum, and with it its gradient, is never made as a whole

W `[E, P, Q]`, L `[E, P, r]`, R `[E, r, Q]` with r small: LoRA on stacked experts. W may be such a sum itself.
"""

from typing import Any, NamedTuple

from torch import Tensor, fx

from fx_passes.body.values import PerExpert
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import arg, fake_tensor, op_name, same_size


class LowRank(NamedTuple):
    """`scale` is a number, or the node of one."""

    base: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    scale: Any


def low_rank(parameter: PerExpert) -> list[LowRank]:
    """The sums that made a stacked weight, the last one first; none where their parts may not stand in its place."""
    sums, node = [], None if parameter.steps else parameter.stacked
    while node is not None and (last := _low_rank(node)) is not None:
        sums.append(last)
        node = last.base
    return sums


def _low_rank(node: fx.Node) -> LowRank | None:
    if op_name(node) != "baddbmm" or arg(node, 3, "beta", 1) != 1 or "out" in node.kwargs:
        return None
    base, lhs, rhs = (arg(node, at, name) for at, name in enumerate(("input", "batch1", "batch2")))
    total, *parts = (fake_tensor(tensor) for tensor in (node, base, lhs, rhs))
    if total is None or not _is_thin_sum(total, parts) or _is_written(base, lhs, rhs):
        return None
    return LowRank(base, lhs, rhs, arg(node, 4, "alpha", 1))


def _is_thin_sum(total: Tensor, parts: list[Tensor | None]) -> bool:
    """Whether the parts are those of `total`, save fewer numbers and are differentiated where it is."""
    base, lhs, rhs = parts
    if base is None or lhs is None or rhs is None or any(part.dtype != total.dtype for part in (base, lhs, rhs)):
        return False
    if base.dim() != 3 or not all(map(same_size, base.shape, total.shape)):
        return False
    rank, rows, columns = lhs.shape[2], *total.shape[1:]
    needs_grad = any(part.requires_grad for part in (base, lhs, rhs))
    return total.requires_grad == needs_grad and rank * (rows + columns) < rows * columns


def _is_written(*parts: fx.Node) -> bool:
    """Whether a part changes anywhere, so that reading it later than the sum did isn't the same."""
    return any(True for part in parts for _ in writers_of(part))
