"""Branches that ask whether an expert has any token: `mask.any()`, `mask.sum() == 0`, `idx.numel() > 0`, `idx.shape[0] == 0`, `len(idx)`."""

from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from fx_passes.facts import Any_, Mask, fact
from fx_passes.ops import arg, op_name

_SAMPLES = (1, 2, 3, 1000, 10**9)


def nonempty_truth(value: TensorVariable | SymNodeVariable, mask_of_symbol: dict[Any, Mask]) -> bool | None:
    """The truth of `value` when the expert has a token; None where `value` does not ask exactly that."""
    if isinstance(value, TensorVariable):
        return _tensor_truth(value.as_proxy().node)
    return _symbol_truth(value.sym_num, mask_of_symbol)


def _tensor_truth(node: fx.Node) -> bool | None:
    if isinstance(fact(node), Any_):
        return True
    name = op_name(node)
    if name in ("eq", "gt", "ne", "greater") and isinstance(fact(node.args[0]), Any_) and arg(node, 1, "other") == 0:
        return name != "eq"
    return None


def _symbol_truth(number: Any, mask_of_symbol: dict[Any, Mask]) -> bool | None:
    """A comparison that is linear in the one symbol splits the naturals at one place: sampling shows whether that is between 0 and 1."""
    if not isinstance(number, (torch.SymBool, torch.SymInt)):
        return None
    expression = number.node.expr
    symbols = expression.free_symbols
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    if symbol not in mask_of_symbol or not _is_linear(expression, symbol):
        return None
    truths = {bool(expression.subs(symbol, sample)) for sample in _SAMPLES}
    empty = bool(expression.subs(symbol, 0))
    if len(truths) == 1 and empty not in truths:
        return truths.pop()
    return None


def _is_linear(expression: Any, symbol: Any) -> bool:
    sides = expression.args if isinstance(expression, sympy.core.relational.Relational) else (expression,)
    return all(sympy.Poly(side, symbol).degree() <= 1 for side in sides if side.has(symbol))
