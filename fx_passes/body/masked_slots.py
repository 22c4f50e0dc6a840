"""Weights of which all but those of one expert's slots are made zero."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from fx_passes.facts import fact
from fx_passes.facts.statements import Mask
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import ZEROS, fake_tensor, op_name

PRODUCTS = frozenset(("mul", "multiply", "where"))


def masked(node: fx.Node) -> Iterator[tuple[fx.Node, Mask]]:
    """(weights, mask) of `weights * mask` and of `where(mask, weights, 0)`."""
    name, operands = op_name(node), node.args
    if name in ("mul", "multiply") and len(operands) == 2:
        pairs = [operands, operands[::-1]]
    elif name == "where" and len(operands) == 3 and _is_zero(operands[2]):
        pairs = [operands[1::-1]]
    else:
        pairs = []
    for weights, factor in pairs:
        known, before, after = fact(factor), fake_tensor(weights), fake_tensor(node)
        if (
            isinstance(weights, fx.Node)
            and isinstance(known, Mask)
            and before is not None
            and after is not None
            and before.dtype == after.dtype
        ):
            yield weights, known


def _is_zero(operand: Any) -> bool:
    if isinstance(operand, fx.Node):
        return op_name(operand) in ZEROS and not any(writers_of(operand))
    return operand == 0
