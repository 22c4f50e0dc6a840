"""Is the expert body row-wise? Then it can run once on all grouped rows instead of once per expert.

Every operation on rows must be known and must keep row i of its output a function of row i of its inputs. What isn't on
a list here is refused.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from fx_passes.body.linear_body import as_linear
from fx_passes.body.simplify import keeps_all
from fx_passes.body.values import Body, Gathered, Op, PerExpert, Shared, SlotGathered, has_rows, nested_values, rank
from fx_passes.graph.ops import POINTWISE, example, fake_tensor, known_tensor, normalized_dim, same_size, varargs
from fx_passes.region import Rejected

MATMUL = frozenset(("linear", "matmul", "mm"))
NORMS = frozenset(("layer_norm", "rms_norm"))
REDUCTIONS = frozenset("softmax log_softmax sum mean amax amin norm var std logsumexp normalize cumsum cumprod".split())
ALONG_DIM = frozenset("chunk split unbind cat stack concat narrow select unsqueeze squeeze glu".split())
RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten"))
PERMUTATIONS = frozenset(("transpose", "permute", "swapaxes", "swapdims"))

DIM_ARGUMENT = {"split": 2, "stack": 1, "cat": 1, "concat": 1, "chunk": 2, "norm": 2, "normalize": 2}
_DIM_DEFAULT = {"chunk": 0, "split": 0, "unbind": 0, "cat": 0, "stack": 0, "concat": 0, "normalize": 1, "glu": -1}


def check_rows(body: Body) -> None:
    """Raises Rejected at the first operation that may mix rows or isn't known."""
    for op in body.of(Op):
        if not op.has_rows:
            raise _refused(op, f"`{op.name}` depends on the expert, but not as a parameter of its own")
        _check(op)


def _check(op: Op) -> None:
    if not op.args or any(isinstance(value, Gathered) and value.leading for value in nested_values(op.args)):
        raise _refused(op, f"`{op.name}` is called in a way that no rule speaks of")
    for names, check in _CHECKS:
        if op.name in names:
            check(op)
            return
    raise _refused(op, f"`{op.name}` is not known to keep rows apart")


def _refused(op: Op, detail: str) -> Rejected:
    return Rejected("body_is_row_wise", op.node, detail)


def _is_row_tensor(value: Any) -> bool:
    return isinstance(value, (Gathered, SlotGathered, Op)) and has_rows(value) and rank(value) is not None


def _check_pointwise(op: Op) -> None:
    """All rows in dim 0; what has no rows must broadcast over it."""
    result = rank(op)
    if op.name in ("max", "min") and len(op.args) + len(op.kwargs) != 2:
        raise _refused(op, f"`{op.name}` reduces")
    if op.name in ("clone", "contiguous", "to") and _changes_device(op):
        raise _refused(op, "rows move to another device")
    for value in nested_values((op.args, op.kwargs)):
        if _is_row_tensor(value):
            if rank(value) != result:
                raise _refused(op, f"rows of rank {rank(value)} broadcast against rank {result}")
        elif has_rows(value):
            raise _refused(op, "the number of rows is used as a value")
        elif isinstance(value, Shared) and not _broadcasts_over_rows(value, result):
            raise _refused(op, "a tensor from outside the loop has a dim where the rows are")
        elif isinstance(value, PerExpert) and not _repeats_over_rows(value, op, result):
            raise _refused(
                op, "an expert's parameter does not broadcast over its rows as it would after being repeated"
            )


def _repeats_over_rows(value: PerExpert, op: Op, result: int | None) -> bool:
    """A parameter is repeated for each row: one that is a scalar then takes part in type promotion."""
    own, tensor, output = rank(value), fake_tensor(value.node), fake_tensor(op.node)
    if own is None or tensor is None or output is None or result is None or value.transposed:
        return False
    return own - value.leading < result and (own > 0 or tensor.dtype == output.dtype)


def _changes_device(op: Op) -> bool:
    before, after = fake_tensor(op.node.all_input_nodes[0]), fake_tensor(op.node)
    return before is None or after is None or before.device != after.device


def _broadcasts_over_rows(value: Shared, result: int | None) -> bool:
    tensor = fake_tensor(value.node)
    if tensor is None:
        return not isinstance(example(value.node), torch.SymInt)
    return bool(result) and (tensor.dim() < result or (tensor.dim() == result and tensor.shape[0] == 1))


def _check_matmul(op: Op) -> None:
    rows, weight, bias = op.args[0], op.arg(1, "weight"), op.arg(2, "bias")
    if len(op.args) < 2 or (bias is not None and type(bias) is not type(weight)):
        raise _refused(op, "weight and bias of a linear layer are not alike")
    if bias is not None and known_tensor(bias.node).dtype != known_tensor(weight.node).dtype:
        raise _refused(op, "weight and bias of a linear layer differ in dtype")
    if isinstance(weight, PerExpert) and weight.leading:
        raise _refused(op, "a stack of one weight matrix")
    if not _is_row_tensor(rows) or rank(rows) != 2:
        raise _refused(op, "the left side of a matrix product is not a matrix of rows")
    if not isinstance(weight, (PerExpert, Shared)) or rank(weight) != 2:
        raise _refused(op, "the right side of a matrix product is no weight matrix")
    if bias is not None and not (isinstance(bias, (PerExpert, Shared)) and rank(bias) == 1):
        raise _refused(op, "the bias of a linear layer is no vector")
    linear = as_linear(op)
    if linear is not None and not same_size(known_tensor(rows.node).shape[-1], linear.widths[0]):
        raise _refused(
            op, "a dim of size one is repeated to be summed over: rows are not as wide as their weight asks for"
        )
    _check_width(op, bias)


def _check_addmm(op: Op) -> None:
    """`addmm(bias, rows, weight)` of an expert's own bias and weight."""
    if len(op.args) != 3 or op.kwargs:
        raise _refused(op, "`addmm` with factors")
    bias, rows, weight = op.args
    own = isinstance(bias, PerExpert) and isinstance(weight, PerExpert) and not weight.leading
    if not own or not _is_row_tensor(rows) or (rank(rows), rank(weight)) != (2, 2) or len(bias.shape) != 1:
        raise _refused(op, "`addmm` of other than a bias, rows and a weight matrix")
    if known_tensor(bias.node).dtype != known_tensor(weight.node).dtype:
        raise _refused(op, "weight and bias of a linear layer differ in dtype")
    _check_width(op, bias)


def _check_width(op: Op, bias: Any) -> None:
    if isinstance(bias, PerExpert) and not same_size(bias.shape[0], known_tensor(op.node).shape[-1]):
        raise _refused(op, "the bias of a linear layer is one number for all columns")


def _check_norm(op: Op) -> None:
    shape = op.arg(1, "normalized_shape")
    if not _is_row_tensor(op.args[0]) or not isinstance(shape, (tuple, list)) or len(shape) >= (rank(op.args[0]) or 0):
        raise _refused(op, f"`{op.name}` normalises over the rows")
    if any(isinstance(value, PerExpert) and value.transposed for value in nested_values((op.args, op.kwargs))):
        raise _refused(op, f"`{op.name}` has a scale whose dims are swapped")


def _check_dims(op: Op) -> None:
    """All operands are rows; the dims that the operation works along must be given and must not be the row dim."""
    operands = list(nested_values((op.args, op.kwargs)))
    operand_rank = rank(operands[0]) if operands and all(map(_is_row_tensor, operands)) else None
    if operand_rank is None:
        raise _refused(op, f"`{op.name}` of something that is not rows")
    dims = op.arg(DIM_ARGUMENT.get(op.name, 1), "dim", _DIM_DEFAULT.get(op.name))
    dims = (dims,) if type(dims) is int else dims
    places = operand_rank + (op.name in ("unsqueeze", "stack"))
    if not isinstance(dims, (tuple, list)) or not dims or any(normalized_dim(dim, places) == 0 for dim in dims):
        raise _refused(op, f"`{op.name}` works along the rows")


def _check_permutation(op: Op) -> None:
    dims = varargs(op.node, 1, "dims")
    places = rank(op.args[0]) or 0
    dims = tuple(normalized_dim(dim, places) for dim in dims)
    if not _is_row_tensor(op.args[0]) or len(dims) < 2 or (dims[0] != 0 if op.name == "permute" else 0 in dims):
        raise _refused(op, f"`{op.name}` moves the row dim")


def _check_reshape(op: Op) -> None:
    before, after = fake_tensor(op.node.all_input_nodes[0]), fake_tensor(op.node)
    if before is None or after is None or not _is_row_tensor(op.args[0]) or before.dtype != after.dtype:
        raise _refused(op, f"`{op.name}` of something that is not rows")
    sizes = (*before.shape[1:], *after.shape[1:])
    if after.dim() == 0 or not all(isinstance(size, int) for size in sizes):
        raise _refused(op, f"`{op.name}` to sizes that are not fixed")
    if math.prod(before.shape[1:]) != math.prod(after.shape[1:]):
        raise _refused(op, f"`{op.name}` merges the row dim with another")


def _check_getitem(op: Op) -> None:
    operand, index = op.args
    if any(isinstance(item, list) for item in (index if isinstance(index, tuple) else (index,))):
        raise _refused(op, "rows are indexed by a list")
    if isinstance(example(op.node.all_input_nodes[0]), (tuple, list)):
        return
    items = index if isinstance(index, tuple) else (index,)
    if not _is_row_tensor(operand) or list(nested_values(index)):
        raise _refused(op, "rows are indexed by a tensor")
    if items[0] is not Ellipsis and items[0] != slice(None):
        raise _refused(op, "some rows of an expert are singled out")
    if items[0] is Ellipsis and len(items) - 1 >= (rank(operand) or 0):
        raise _refused(op, "some rows of an expert are singled out")


def _check_dropout(op: Op) -> None:
    if not keeps_all(op):
        raise _refused(op, "`dropout` draws random numbers")


_CHECKS: tuple[tuple[frozenset[str], Callable[[Op], None]], ...] = (
    (POINTWISE, _check_pointwise),
    (MATMUL, _check_matmul),
    (frozenset(("addmm",)), _check_addmm),
    (NORMS, _check_norm),
    (REDUCTIONS | ALONG_DIM, _check_dims),
    (PERMUTATIONS, _check_permutation),
    (RESHAPES, _check_reshape),
    (frozenset(("getitem",)), _check_getitem),
    (frozenset(("dropout",)), _check_dropout),
)
