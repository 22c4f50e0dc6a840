"""Ways of writing the same operation of a body, as the one that the rules know."""

from dataclasses import replace

from fx_passes.body import Gathered, Op, PerExpert, Value, rank
from fx_passes.ops import casts_nothing, fake_tensor, varargs

_CASTS = frozenset("to float half bfloat16 double type_as contiguous".split())


def simplified(op: Op) -> Value:
    """`x[None, tokens].reshape(-1, D)` is `x[tokens]`; a transposed parameter is the parameter, seen transposed."""
    operand = op.args[0] if op.args else None
    result = fake_tensor(op.node)
    if isinstance(operand, Gathered) and operand.leading and op.name in ("reshape", "view", "squeeze"):
        before = fake_tensor(operand.node)
        if (
            before is not None
            and result is not None
            and result.dim() >= 1
            and before.shape[operand.leading + 1 :] == result.shape[1:]
        ):
            return replace(operand, leading=0, node=op.node)
    if isinstance(operand, PerExpert) and result is not None:
        if result.dim() == 2 and _swaps_two_dims(op):
            return replace(operand, transposed=not operand.transposed)
        if op.name in _CASTS and casts_nothing(op.node):
            return operand
        if rank(operand) == result.dim() - 1 and _adds_first_dim(op):
            return replace(operand, node=op.node, leading=operand.leading + 1)
    return _product(op) if op.name == "einsum" else op


def _adds_first_dim(op: Op) -> bool:
    """`bias[None]`, `bias.unsqueeze(0)`."""
    if op.name == "unsqueeze":
        return op.arg(1, "dim") == 0
    return op.name == "getitem" and op.args[1] in (None, (None,), (None, slice(None)), (None, Ellipsis))


def _product(op: Op) -> Op:
    """An einsum that is rows times an expert's matrix, as a product."""
    equation, weight = op.args[0], op.args[2] if len(op.args) == 3 else None
    if not isinstance(equation, str) or not isinstance(weight, PerExpert) or weight.leading or rank(weight) != 2:
        return op
    inputs, _, out = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if len(left) != 2 or len(set(left + right)) != 3 or out[:1] != left[0]:
        return op
    products = {left[1] + out[1:]: "matmul", out[1:] + left[1]: "linear"}
    return replace(op, name=products[right], args=op.args[1:]) if right in products and len(out) == 2 else op


def _swaps_two_dims(op: Op) -> bool:
    if op.name == "t":
        return True
    if op.name in ("transpose", "swapaxes", "swapdims", "permute") and len(op.node.args) > 1:
        dims = [dim % 2 for dim in varargs(op.node, 1, "dims")]
        return dims == [1, 0] or (op.name != "permute" and sorted(dims) == [0, 1])
    return op.name == "getattr" and op.node.args[1] in ("T", "mT")
