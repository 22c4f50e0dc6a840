"""What stands between an expert's two products: an activation, gated or not, as the fused operator names it.

act(gate)    act(gate) * up         gate and up halves of one product, or two products of the same rows
"""

from typing import Any, NamedTuple

from fx_passes.body.halves import joined
from fx_passes.body.linear_body import Linear, as_linear, binary, same_rows
from fx_passes.body.values import Op, Value, rank
from fx_passes.graph.ops import fake_tensor


class Activated(NamedTuple):
    """What is applied to the products `gate_up` and `up`, as the fused operator names it, and its settings."""

    activation: str
    layout: str
    gate_up: Linear
    up: Linear | None
    numbers: dict[str, float]


def match_activation(value: Value) -> Activated | None:
    """The activation that `value` is of an expert's first products, or None."""
    clamped = _match_clamped(value)
    if clamped is not None:
        return clamped
    factors = binary(value, ("mul", "multiply"))
    for acted, other in (factors, factors[::-1]) if factors is not None else ():
        name = activation_name(acted)
        if name is not None:
            halves = _halves(_argument(acted), other)
            return None if halves is None else Activated(name, *halves, {})
    name = activation_name(value)
    plain = as_linear(_argument(value)) if name is not None else None
    return None if plain is None or name is None else Activated(name, "plain", plain, None, {})


def activation_name(value: Any) -> str | None:
    """The fused op's name for an activation function, or None."""
    if not isinstance(value, Op):
        return None
    if value.name in ("silu", "relu"):
        return value.name
    if value.name == "gelu":
        approximate = value.arg(1, "approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    squares = value.name == "square" or (value.name == "pow" and len(value.args) == 2 and value.args[1] == 2)
    if squares and isinstance(value.args[0], Op) and value.args[0].name == "relu":
        return "relu2"
    return None


def _argument(value: Any) -> Any:
    """What the activation is applied to."""
    inner = value.args[0]
    return inner.args[0] if activation_name(value) == "relu2" else inner


def _halves(gate: Any, up: Any) -> tuple[str, Linear, Linear | None] | None:
    """Gate and up as halves of one product, or as two products of the same rows."""
    source, place = _half(gate)
    other, other_place = _half(up)
    if source is not None and source is other:
        product = as_linear(source)
        layout = {("first", "second"): "concatenated", ("even", "odd"): "interleaved"}.get((place, other_place))
        return None if product is None or layout is None else (layout, product, None)
    gate_linear, up_linear = as_linear(gate), as_linear(up)
    if gate_linear is None or up_linear is None or (gate_linear.bias is None) != (up_linear.bias is None):
        return None
    return _joined(gate_linear, up_linear) or ("separate", gate_linear, up_linear)


def _joined(gate: Linear, up: Linear) -> tuple[str, Linear, None] | None:
    """The one product that these are, of the same rows with halves of one parameter."""
    if not same_rows(gate.rows, up.rows) or gate.transposed != up.transposed:
        return None
    weight, bias = joined(gate.weight, up.weight, dim=int(gate.transposed)), None
    if gate.bias is not None and up.bias is not None:
        bias = joined(gate.bias, up.bias, dim=0)
    if weight is None or (gate.bias is not None and (bias is None or bias[0] != weight[0])):
        return None
    layout, whole = weight
    return layout, Linear(gate.rows, whole, bias[1] if bias is not None else None, gate.transposed), None


def _half(value: Any) -> tuple[Any, str]:
    """(h, "first" | "second" | "even" | "odd") for the halves of h's last dim; (None, "") for anything else."""
    if not isinstance(value, Op) or value.name != "getitem":
        return None, ""
    source, index = value.args
    if isinstance(source, Op) and source.name == "chunk" and source.args[1:2] == (2,) and index in (0, 1):
        if source.arg(2, "dim", 0) not in (-1, 1) or rank(source.args[0]) != 2:
            return None, ""
        return source.args[0], ("first", "second")[index]
    tensor = fake_tensor(getattr(source, "node", None))
    if tensor is None or tensor.dim() != 2 or not _keeps_rows(index):
        return None, ""
    half = tensor.shape[1] // 2
    places = {(None, None, 2): "even", (0, None, 2): "even", (1, None, 2): "odd"}
    places |= {(None, half, None): "first", (0, half, None): "first", (half, None, None): "second"}
    part = index[1]
    return source, places.get((part.start, part.stop, part.step), "")


def _keeps_rows(index: Any) -> bool:
    """`[..., a:b:c]` or `[:, a:b:c]`."""
    if not isinstance(index, tuple) or len(index) != 2 or not isinstance(index[1], slice):
        return False
    return index[0] is Ellipsis or index[0] == slice(None)


def _match_clamped(value: Value) -> Activated | None:
    """gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit), (u + 1) * (g * sigmoid(alpha * g))."""
    factors = binary(value, ("mul",))
    for shifted, glu in (factors, factors[::-1]) if factors is not None else ():
        up, gate_and_sigmoid = _without_one(shifted), binary(glu, ("mul",))
        if up is None or gate_and_sigmoid is None:
            continue
        gate, sigmoid = gate_and_sigmoid
        if not (isinstance(sigmoid, Op) and sigmoid.name == "sigmoid"):
            gate, sigmoid = sigmoid, gate
        alpha = _scale(sigmoid, gate)
        limits = _clamp(gate), _clamp(up)
        if alpha is None or limits[0] is None or limits[1] is None:
            continue
        (gate_source, low, high), (up_source, up_low, up_high) = limits
        halves = _halves(gate_source, up_source)
        if halves is not None and low is None and high is not None and up_high == high and up_low == -high:
            return Activated("clamped_swiglu", *halves, {"alpha": float(alpha), "limit": float(high)})
    return None


def _without_one(value: Value) -> Any:
    """u of `u + 1`."""
    terms = binary(value, ("add",))
    pairs = (terms, terms[::-1]) if terms is not None else ()
    return next((term for term, one in pairs if isinstance(one, (int, float)) and one == 1), None)


def _scale(sigmoid: Any, gate: Any) -> float | None:
    """alpha of `sigmoid(alpha * gate)`."""
    if not isinstance(sigmoid, Op) or sigmoid.name != "sigmoid":
        return None
    factors = binary(sigmoid.args[0], ("mul",))
    if factors is None or gate not in factors:
        return None
    number = factors[1] if factors[0] is gate else factors[0]
    return number if isinstance(number, (int, float)) else None


def _clamp(value: Any) -> tuple[Any, float | None, float | None] | None:
    if not isinstance(value, Op) or value.name not in ("clamp", "clip"):
        return None
    limits = value.arg(1, "min"), value.arg(2, "max")
    are_numbers = all(limit is None or isinstance(limit, (int, float)) for limit in limits)
    return (value.args[0], *limits) if are_numbers else None
