"""Branches that ask whether an expert has any token.

`mask.any()`, `mask.sum() == 0`, `idx.numel() > 0`, `idx.shape[0] == 0`, `len(idx)`
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable

from fx_passes.capture.counts import is_of_experts
from fx_passes.facts import fact
from fx_passes.facts.statements import Mask, Occupied
from fx_passes.facts.totals import Total, total_of
from fx_passes.graph.ops import arg, op_name

_SAMPLES = (1, 2, 3, 1000, 10**9)
_SIZE = sympy.Symbol("size", integer=True)


@dataclass(frozen=True)
class Question:
    """A branch on whether the expert of `mask` has a token; `truth` is what it evaluates to when it has."""

    mask: Mask
    truth: bool


def nonempty_question(value: TensorVariable | SymNodeVariable, mask_of_symbol: dict[Any, Mask]) -> Question | None:
    """What `value` asks; None where it asks anything else."""
    if isinstance(value, TensorVariable):
        return _tensor_question(value.as_proxy().node)
    return _symbol_question(value.sym_num, mask_of_symbol)


def _tensor_question(node: fx.Node) -> Question | None:
    mask = _counted_mask(node)
    if mask is not None:
        return Question(mask, True)
    name = op_name(node)
    if name not in ("eq", "gt", "ne", "greater"):
        return None
    left, right = arg(node, 0, "input"), arg(node, 1, "other")
    mask = _counted_mask(left) if right == 0 else _mask_of_one(_difference(left, right))
    return Question(mask, name != "eq") if mask is not None else None


def _counted_mask(node: Any) -> Mask | None:
    """The mask of which `node` says how many slots it has, or whether any."""
    known = fact(node)
    return known.mask if isinstance(known, Occupied) else _mask_of_one(total_of(node))


def _mask_of_one(total: Total | None) -> Mask | None:
    """The mask of the one expert whose slots are counted."""
    if total is None or total.stop != total.first + 1 or not is_of_experts(fact(total.node)):
        return None
    return Mask(total.ids, total.first, ("N",))


def _difference(left: Any, right: Any) -> Total | None:
    last, first = total_of(left), total_of(right)
    return last.minus(first) if last is not None and first is not None else None


def _symbol_question(number: Any, mask_of_symbol: dict[Any, Mask]) -> Question | None:
    """What a comparison of sizes asks.

    One that is linear in its one size splits the naturals at one place: sampling shows whether that is between 0 and 1.
    """
    if not isinstance(number, (torch.SymBool, torch.SymInt)):
        return None
    expression = number.node.expr
    if isinstance(expression, sympy.core.relational.Relational):
        left, right = expression.args
        expression = expression.func(sympy.expand(sympy.Add(left, sympy.Mul(-1, right))), 0)
    size, expression = _in_one_size(expression, mask_of_symbol)
    if size is None or not _is_linear(expression, _SIZE):
        return None
    truths = {bool(expression.subs(_SIZE, sample)) for sample in _SAMPLES}
    empty = bool(expression.subs(_SIZE, 0))
    if len(truths) == 1 and empty not in truths:
        return Question(mask_of_symbol[size], truths.pop())
    return None


def _in_one_size(expression: Any, sizes: Iterable[Any]) -> tuple[Any, Any]:
    """(size, `expression` in terms of `_SIZE`), where it is about one of `sizes` alone. A size may be a sum itself."""
    left = expression.lhs if isinstance(expression, sympy.core.relational.Relational) else expression
    for size in sizes:
        if size.is_Symbol:
            inner = expression.subs(size, _SIZE)
        else:
            factor = 1 if (left - size).is_number else -1
            inner = expression.subs(left, sympy.expand(left - factor * size) + factor * _SIZE)
        if inner.free_symbols == {_SIZE}:
            return size, inner
    return None, None


def _is_linear(expression: Any, symbol: Any) -> bool:
    sides = expression.args if isinstance(expression, sympy.core.relational.Relational) else (expression,)
    return all(sympy.Poly(side, symbol).degree() <= 1 for side in sides if side.has(symbol))
