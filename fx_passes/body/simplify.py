"""Ways of writing the same operation of a body, as the one that the rules know."""

from dataclasses import replace

from fx_passes.body.values import Gathered, Op, PerExpert, Value, rank
from fx_passes.graph.ops import CASTS, casts_nothing, fake_tensor, squeezes_nothing


def simplified(op: Op) -> Value:
    """`x[None, tokens].reshape(-1, D)` is `x[tokens]`; a parameter that is cast to what it is, itself."""
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
    if isinstance(operand, PerExpert) and op.name in CASTS | {"contiguous"} and casts_nothing(op.node):
        return operand
    if isinstance(operand, (Op, Gathered)) and squeezes_nothing(op.node):
        return operand
    if isinstance(operand, Op) and op.name == "dropout" and keeps_all(op):
        return operand
    return _product(op) if op.name == "einsum" else op


def keeps_all(dropout: Op) -> bool:
    """Whether `dropout` drops nothing."""
    return dropout.arg(2, "training", True) is False or dropout.arg(1, "p", 0.5) == 0.0


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
