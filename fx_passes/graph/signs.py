"""Is a tensor nowhere negative, whatever the inputs? NaN is not negative."""

from typing import Any

from torch import fx

from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import ZEROS, arg, fake_tensor, op_name

_NEVER_NEGATIVE = frozenset("softmax sigmoid relu exp square abs softplus rand one_hot ones ones_like".split()) | ZEROS
_KEEP_SIGNS = frozenset(
    """
    to float half bfloat16 double type_as contiguous clone detach view reshape flatten squeeze unsqueeze transpose t
    permute expand topk sort max amax amin sum mean cumsum sqrt
    """.split()
)
_OF_TWO = frozenset("add mul multiply div divide truediv true_divide maximum".split())


def is_nonnegative(value: Any) -> bool:
    """Whether no entry of `value`, a node or a number, can be below zero."""
    if isinstance(value, (int, float)):
        return value >= 0
    if not isinstance(value, fx.Node) or (fake_tensor(value) is not None and any(writers_of(value))):
        return False
    name, source = op_name(value), arg(value, 0, "input")
    if name in _NEVER_NEGATIVE:
        return True
    if name in _KEEP_SIGNS or name == "getitem":
        return is_nonnegative(source)
    if name in _OF_TWO:
        return "alpha" not in value.kwargs and is_nonnegative(source) and is_nonnegative(arg(value, 1, "other"))
    if name == "scatter":
        return "reduce" not in value.kwargs and is_nonnegative(source) and is_nonnegative(_scattered(value))
    return False


def _scattered(node: fx.Node) -> Any:
    """What a scatter puts in."""
    return next((node.kwargs[name] for name in ("src", "value") if name in node.kwargs), arg(node, 3, "src"))
