"""The weight of the router on an expert's rows, taken off: combining multiplies by it in fp32, and rounds once."""

from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import fx

from fx_passes.body.linear_body import binary
from fx_passes.body.values import Op, Scaled, SlotGathered, Value, rank
from fx_passes.graph.ops import CASTS, FLOATS, fake_tensor, same_sizes
from fx_passes.graph.rounding import keeps_digits


@dataclass(frozen=True)
class Weighted:
    """The body with the router weight taken off."""

    core: Value
    weights: SlotGathered | None


def without_router_weight(value: Value) -> Weighted:
    """Splits `cast(core * weights[tokens, slots, None])`; a body without such a factor is its own core."""
    if isinstance(value, Scaled):
        return Weighted(_uncast_exact(value.rows), value.weights)
    inner = _uncast(value)
    factors = binary(inner, ("mul", "multiply"))
    if factors is not None:
        for core, factor in (factors, factors[::-1]):
            weights = router_weight(factor, inner.node)
            if weights is not None and not isinstance(core, SlotGathered) and rank(core) == 2:
                return Weighted(_uncast_exact(core), weights)
    return Weighted(value, None)


def before_casts(value: Value) -> Value:
    """`value` before casts of floating point rows and the router's weight."""
    value = without_router_weight(value).core
    while _casts_rows(value):
        value = value.args[0]
    return value


def router_weight(value: Any, product: fx.Node) -> SlotGathered | None:
    """`weights[tokens, slots, None]`, where the factor of `product` is one value a row."""
    while isinstance(value, Op) and (_is_column(value) or _is_cast_of_slots(value, product)):
        value = value.args[0]
    return value if isinstance(value, SlotGathered) else None


def _uncast(value: Value) -> Value:
    """`value` before casts of floating point rows, none of which drops digits that `value` has place for."""
    last = value
    while _casts_rows(value) and keeps_digits(value.node, last.node):
        value = value.args[0]
    return value


def _casts_rows(value: Value) -> TypeGuard[Op]:
    """Whether `value` is a cast of computed floating point rows."""
    return isinstance(value, Op) and value.name in CASTS and isinstance(value.args[0], Op) and _is_float_cast(value)


def _is_float_cast(op: Op) -> bool:
    """Whether `op` casts between dtypes in which combining in fp32 may as well be done without it."""
    before, after = fake_tensor(op.args[0].node), fake_tensor(op.node)
    return before is not None and after is not None and {before.dtype, after.dtype} <= FLOATS


def _uncast_exact(value: Value) -> Value:
    """Without a cast that widens the rows before they are weighted: combining is done in fp32 anyway."""
    if _casts_rows(value):
        before, after = fake_tensor(value.args[0].node), fake_tensor(value.node)
        if before is not None and after is not None and before.dtype.itemsize <= after.dtype.itemsize:
            return value.args[0]
    return value


def _is_cast_of_slots(op: Op, product: fx.Node) -> bool:
    is_cast = op.name in CASTS and isinstance(op.args[0], (SlotGathered, Op)) and _is_float_cast(op)
    return is_cast and keeps_digits(op.node, product)


def _is_column(op: Op) -> bool:
    if op.name not in ("unsqueeze", "view", "reshape"):
        return False
    before, after = fake_tensor(op.node.all_input_nodes[0]), fake_tensor(op.node)
    if before is None or after is None or not isinstance(op.args[0], (SlotGathered, Op)):
        return False
    return after.dim() == 2 and after.shape[1] == 1 and (before.dim() == 1 or same_sizes(before.shape, after.shape))
