"""Is a table of weights zero but for the experts that each token chose?

`chosen_by(table)` answers with the ids [T, K] outside of which a table [T, E] is provably zero, whatever the inputs.
Both may have more dims of tokens, and not the same: `table.reshape(-1, E)`. A table [E, T] is the transpose of such a
table, or made of one: `sigmoid(scores.t())`.

    zeros.scatter(1, ids, weights)                          and products, casts and quotients of such tables, normalize
    (one_hot(ids, E) * weights.unsqueeze(-1)).sum(-2)       one_hot(ids, E).sum(-2), einsum("tke,tk->te", ...)
    softmax(full(-inf).scatter(1, ids, logits), -1)         and sigmoid
    softmax(logits.masked_fill(~mask, -inf), -1)            with a mask that is such a table

A threshold (`probs >= kth`) proves nothing: ties choose more than K.
"""

import math
from typing import Any

from torch import fx

from fx_passes.body.values import Op, SlotGathered
from fx_passes.facts import fact
from fx_passes.facts.statements import OneHot
from fx_passes.graph.aliasing import writers_of
from fx_passes.graph.ops import (
    ZEROS,
    arg,
    casts_floats,
    fake_tensor,
    is_dim,
    is_inplace,
    is_last_dim,
    keeps_last_dim,
    op_name,
    same_size,
    same_sizes,
    sizes_of,
)
from fx_passes.graph.views import is_transposed

_SAME = frozenset("to float half bfloat16 double type_as bool contiguous clone detach".split())
_RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten"))
_COMPARED_WITH_ZERO = frozenset(("gt", "ne"))
_QUOTIENTS = frozenset(("div", "divide", "truediv", "true_divide", "itruediv", "div_"))
_ZERO_AT_ZERO = frozenset(
    "silu gelu relu relu6 tanh square neg abs sin to float half bfloat16 contiguous clone chunk getitem reshape".split()
)
_NEGATIONS = frozenset(("logical_not", "bitwise_not", "invert"))


def chosen_by(node: Any, experts: int = -1) -> fx.Node | None:
    """The ids outside of which `node`, with experts along dim -1 or -2, is zero or false; None where unproven."""
    if fake_tensor(node) is None or _is_changed(node):
        return None
    name, source = op_name(node), arg(node, 0, "input")
    by_slot = _summed_one_hot(node) if experts == -1 else None
    if by_slot is not None:
        return by_slot if not any(writers_of(by_slot)) else None
    if name in ("scatter", "scatter_", *ZEROS):
        return _filled(node, 0.0) if experts == -1 else None
    if name in _SAME or (name in _QUOTIENTS and _is_one_a_row(arg(node, 1, "other"), experts)):
        return chosen_by(source, experts)
    if name == "normalize":
        along = is_dim(arg(node, 2, "dim", 1), node, experts) and "out" not in node.kwargs
        return chosen_by(source, experts) if along else None
    if name in _RESHAPES:
        return chosen_by(source) if experts == -1 and keeps_last_dim(node) else None
    if name in _COMPARED_WITH_ZERO:
        return chosen_by(source, experts) if _number(arg(node, 1, "other")) == 0.0 else None
    if name in ("mul", "multiply"):
        factors = (source, arg(node, 1, "other"))
        return next((ids for factor in factors if (ids := _chosen_beside(factor, node, experts)) is not None), None)
    if name in ("softmax", "sigmoid"):
        along = name == "sigmoid" or is_dim(arg(node, 1, "dim"), node, experts)
        return _left_by(source, experts) if along else None
    if is_transposed(node):
        return chosen_by(source, -3 - experts)
    return _selected(node, 0.0, experts)


def _summed_one_hot(node: fx.Node) -> fx.Node | None:
    """The ids behind a one-hot tensor that is summed over slots, perhaps times other things before that."""
    known, source = fact(node), arg(node, 0, "input")
    if isinstance(known, OneHot):
        return known.ids if known.dims[-1] == "E" and "K" not in known.dims else None
    if op_name(node) == "einsum":
        return _contracted_one_hot(node)
    is_sum = op_name(node) == "sum" and is_dim(arg(node, 1, "dim"), source, -2) and not arg(node, 2, "keepdim", False)
    return _one_hot_by_slot(source) if is_sum else None


def _contracted_one_hot(node: fx.Node) -> fx.Node | None:
    """`einsum("tke,tk->te", one_hot(ids, E), weights)`, in any order."""
    equation, operands = node.args[0], node.args[1:]
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        ids = _one_hot_by_slot(operand)
        if ids is not None and len(set(letters)) == len(letters) and letters[:-2] + letters[-1] == out:
            return ids
    return None


def _one_hot_by_slot(node: Any) -> fx.Node | None:
    """The ids of a tensor [.., K, E] that is zero for the classes which a slot doesn't have."""
    known, tensor = fact(node), fake_tensor(node)
    if isinstance(known, OneHot):
        return known.ids if known.dims[-2:] == ("K", "E") else None
    if tensor is None or _is_changed(node) or op_name(node) not in ("mul", "multiply", *_SAME):
        return None
    factors = [factor for factor in node.args[:2] if same_sizes(sizes_of(factor), tensor.shape)]
    return next((ids for factor in factors if (ids := _one_hot_by_slot(factor)) is not None), None)


def _left_by(node: Any, experts: int) -> fx.Node | None:
    """The ids outside of which `node` is -inf."""
    if fake_tensor(node) is None or _is_changed(node):
        return None
    name, source = op_name(node), arg(node, 0, "input")
    if name in ("scatter", "scatter_"):
        return _filled(node, -math.inf) if experts == -1 else None
    if casts_floats(node) or name in ("contiguous", "clone"):
        return _left_by(source, experts)
    if is_transposed(node):
        return _left_by(source, -3 - experts)
    return _selected(node, -math.inf, experts)


def _filled(node: fx.Node, outside: float) -> fx.Node | None:
    return _scattered_later(node) if op_name(node) in ZEROS else _scattered(node, outside)


def _scattered(node: fx.Node, outside: float) -> fx.Node | None:
    """`full(outside).scatter(1, ids, ...)`, of a tensor that nothing else writes to."""
    table, dim, ids = (arg(node, at, name) for at, name in enumerate(("input", "dim", "index")))
    shape, index = fake_tensor(table), fake_tensor(ids)
    if shape is None or index is None or shape.dim() < 2 or not is_last_dim(dim, table) or any(writers_of(ids)):
        return None
    if "reduce" in node.kwargs or len(node.args) > 4 or set(writers_of(table)) - {node}:
        return None
    if is_inplace(node) and any(user < node for user in table.users):
        return None
    return ids if _filled_with(table) == outside else None


def _scattered_later(table: fx.Node) -> fx.Node | None:
    """`table = zeros(...); table.scatter_(1, ids, ...)`, and `table` is read after that."""
    writers = list(writers_of(table))
    return _scattered(writers[0], 0.0) if len(writers) == 1 and op_name(writers[0]) == "scatter_" else None


def _selected(node: fx.Node, outside: float, experts: int) -> fx.Node | None:
    """`masked_fill(table, not chosen, outside)`, `where(chosen, table, outside)`."""
    name = op_name(node)
    if name == "masked_fill" and _number(arg(node, 2, "value")) == outside:
        return _not_chosen_by(arg(node, 1, "mask"), node, experts)
    if name == "where" and len(node.args) == 3 and _number(node.args[2]) == outside:
        return _chosen_beside(node.args[0], node, experts)
    return None


def _not_chosen_by(node: Any, table: fx.Node, experts: int) -> fx.Node | None:
    name = op_name(node) if isinstance(node, fx.Node) else None
    if name in _NEGATIONS or (name == "eq" and _number(arg(node, 1, "other")) == 0.0):
        return _chosen_beside(arg(node, 0, "input"), table, experts)
    return None


def _chosen_beside(operand: Any, table: fx.Node, experts: int) -> fx.Node | None:
    """`chosen_by(operand)`, which has an entry for each expert of `table`: one for all of them chooses none."""
    own, result = fake_tensor(operand), fake_tensor(table)
    if own is None or result is None or own.dim() < 2 or not same_size(own.shape[experts], result.shape[experts]):
        return None
    return chosen_by(operand, experts)


def _filled_with(node: fx.Node) -> float | None:
    """The number that a fresh tensor holds everywhere."""
    name = op_name(node)
    if name in ZEROS:
        return 0.0
    if name in ("full", "full_like", "new_full"):
        return _number(arg(node, 2 if name == "new_full" else 1, "fill_value"))
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (bool, int, float)) else None


def _is_one_a_row(divisor: Any, experts: int) -> bool:
    """A divisor that is zero leaves nothing of the row that is finite, what was chosen too."""
    tensor = fake_tensor(divisor)
    return tensor is None or tensor.dim() == 0 or (tensor.dim() >= 2 and tensor.shape[experts] == 1)


def _is_changed(node: fx.Node) -> bool:
    """Whether `node` is written to otherwise than by a quotient or the scatter that fills it."""
    writers = set(writers_of(node)) - {node}
    filling = {writer for writer in writers if op_name(writer) == "scatter_"}
    if len(filling | ({node} if op_name(node) == "scatter_" else set())) > 1:
        return True
    return not all(_divides_rows(writer) for writer in writers - filling)


def _divides_rows(write: fx.Node) -> bool:
    """Whether `write` divides by one number a row, in place, a table with experts along its last dim."""
    experts = -2 if is_transposed(write.args[0]) else -1
    return op_name(write) in _QUOTIENTS and _is_one_a_row(arg(write, 1, "other"), experts)


def adds_nothing_where_unchosen(value: Any) -> bool:
    """Whether an expert's row is zero where the weight in it is zero."""
    if isinstance(value, SlotGathered):
        return value.table
    if not isinstance(value, Op):
        return False
    first = value.args[0]
    if value.name in ("mul", "multiply"):
        return any(map(adds_nothing_where_unchosen, value.args))
    if value.name in ("add", "sub"):
        return all(map(adds_nothing_where_unchosen, value.args[:2]))
    if value.name == "linear":
        return len(value.args) == 2 and adds_nothing_where_unchosen(first)
    return value.name in _ZERO_AT_ZERO and adds_nothing_where_unchosen(first)
