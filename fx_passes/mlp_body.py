"""Is the expert body a (gated) MLP with the router weight on its output or input? Then one fused op computes it.

    gate, up = halves of x W_gate_up^T + b          y = (act(gate) * up) W_down^T + b          out += s * y

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fx_passes.body import Body, Gathered, Op, PerExpert, Scaled, SlotGathered, Value, rank
from fx_passes.halves import joined
from fx_passes.low_rank import low_rank
from fx_passes.ops import fake_tensor, same_size, same_sizes

_CASTS = frozenset(("to", "float", "half", "bfloat16", "type_as"))
Size = int | torch.SymInt

_FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))


@dataclass(frozen=True)
class Weighted:
    """The body with the router weight taken off."""

    core: Value
    weights: SlotGathered | None


@dataclass(frozen=True)
class Linear:
    rows: Value
    weight: PerExpert
    bias: PerExpert | None
    transposed: bool

    @property
    def widths(self) -> tuple[Size, Size]:
        """Of the rows that go in, and of those that come out."""
        first, second = self.weight.shape
        return (first, second) if self.transposed else (second, first)


@dataclass(frozen=True)
class Mlp:
    x: fx.Node
    weights: SlotGathered | None
    weight_on: str
    gate_up: Linear
    up: Linear | None
    down: Linear
    activation: str
    layout: str
    alpha: float = 1.702
    limit: float = 7.0


def without_router_weight(value: Value) -> Weighted:
    """Splits `cast(core * weights[tokens, slots, None])`; a body without such a factor is its own core."""
    if isinstance(value, Scaled):
        return Weighted(_uncast_exact(value.rows), value.weights)
    inner = _uncast(value)
    factors = _binary(inner, ("mul", "multiply"))
    if factors is not None:
        for core, factor in (factors, factors[::-1]):
            weights = router_weight(factor)
            if weights is not None and not isinstance(core, SlotGathered) and rank(core) == 2:
                return Weighted(_uncast_exact(core), weights)
    return Weighted(value, None)


def router_weight(value: Any) -> SlotGathered | None:
    """`weights[tokens, slots, None]`, where the factor is one value a row."""
    while isinstance(value, Op) and (_is_column(value) or _is_cast_of_slots(value)):
        value = value.args[0]
    return value if isinstance(value, SlotGathered) else None


def match_mlp(body: Body) -> Mlp | None:
    """The MLP that `body` is, or None."""
    weighted = without_router_weight(body.root)
    down = as_linear(weighted.core)
    if down is None:
        return None
    activated = match_activation(down.rows)
    if activated is None:
        return None
    activation, layout, gate_up, up, numbers = activated
    x, weights, weight_on = gate_up.rows, weighted.weights, "output"
    if weights is None and isinstance(x, Op):
        scaled = without_router_weight(x)
        x, weights, weight_on = scaled.core, scaled.weights, "input"
    if not isinstance(x, Gathered) or x.leading or (up is not None and not _same_rows(up.rows, gate_up.rows)):
        return None
    if not _one_layout((gate_up, up, down)) or rank(x) != 2 or any(map(_is_low_rank, (gate_up, up, down))):
        return None
    if not _have_widths_of_an_mlp(gate_up, up, down, layout):
        return None
    return Mlp(x.source, weights, weight_on, gate_up, up, down, activation, layout, **numbers)


def as_linear(value: Any) -> Linear | None:
    """`F.linear(rows, W, b)`, `rows @ W`, `rows @ W + b` with the expert's own W and b."""
    if not isinstance(value, Op):
        return None
    if value.name == "linear":
        bias = value.arg(2, "bias")
        return _linear(value.args[0], value.args[1], bias, transposed=False)
    if value.name in ("matmul", "mm"):
        return _linear(value.args[0], value.args[1], None, transposed=True)
    if value.name == "addmm" and len(value.args) == 3 and not value.kwargs:
        bias, rows, weight = value.args
        return _linear(rows, weight, bias, transposed=True)
    terms = _binary(value, ("add",))
    for product, bias in (terms, terms[::-1]) if terms is not None else ():
        inner = as_linear(product)
        if (
            inner is not None
            and inner.bias is None
            and isinstance(bias, PerExpert)
            and _dtype(value) == _dtype(product)
        ):
            return _linear(inner.rows, inner.weight, bias, inner.transposed != inner.weight.transposed)
    return None


def _linear(rows: Value, weight: Any, bias: Any, transposed: bool) -> Linear | None:
    if not isinstance(weight, PerExpert) or weight.leading or not (bias is None or isinstance(bias, PerExpert)):
        return None
    if isinstance(bias, PerExpert) and (rank(bias) != 1 + bias.leading or _dtype(bias) != _dtype(weight)):
        return None
    linear = Linear(rows, weight, bias, transposed != weight.transposed)
    return linear if bias is None or same_size(bias.shape[0], linear.widths[1]) else None


def _dtype(value: Value) -> torch.dtype | None:
    tensor = fake_tensor(value.node)
    return tensor.dtype if tensor is not None else None


def match_activation(value: Value) -> tuple[str, str, Linear, Linear | None, dict[str, float]] | None:
    clamped = _match_clamped(value)
    if clamped is not None:
        return clamped
    factors = _binary(value, ("mul", "multiply"))
    for acted, other in (factors, factors[::-1]) if factors is not None else ():
        name = activation_name(acted)
        if name is not None:
            halves = _halves(_argument(acted), other)
            return None if halves is None else (name, *halves, {})
    name = activation_name(value)
    plain = as_linear(_argument(value)) if name is not None else None
    return None if plain is None or name is None else (name, "plain", plain, None, {})


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
    if not _same_rows(gate.rows, up.rows) or gate.transposed != up.transposed:
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


def _match_clamped(value: Value) -> tuple[str, str, Linear, Linear | None, dict[str, float]] | None:
    """gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit), (u + 1) * (g * sigmoid(alpha * g))."""
    factors = _binary(value, ("mul",))
    for shifted, glu in (factors, factors[::-1]) if factors is not None else ():
        plus_one = _binary(shifted, ("add",))
        gate_and_sigmoid = _binary(glu, ("mul",))
        if (
            plus_one is None
            or gate_and_sigmoid is None
            or 1 not in (plus_one[1:] if not isinstance(plus_one[1], Op) else plus_one[:1])
        ):
            continue
        up = plus_one[0] if isinstance(plus_one[0], Op) else plus_one[1]
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
            return "clamped_swiglu", *halves, {"alpha": float(alpha), "limit": float(high)}
    return None


def _scale(sigmoid: Any, gate: Any) -> float | None:
    """alpha of `sigmoid(alpha * gate)`."""
    if not isinstance(sigmoid, Op) or sigmoid.name != "sigmoid":
        return None
    factors = _binary(sigmoid.args[0], ("mul",))
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


def _binary(value: Any, names: tuple[str, ...]) -> tuple[Any, Any] | None:
    if isinstance(value, Op) and value.name in names and len(value.args) == 2 and not value.kwargs:
        return value.args[0], value.args[1]
    return None


def _same_rows(left: Value, right: Value) -> bool:
    if isinstance(left, Gathered) and isinstance(right, Gathered):
        return left.source is right.source and left.leading == right.leading
    return left is right


def _have_widths_of_an_mlp(gate_up: Linear, up: Linear | None, down: Linear, layout: str) -> bool:
    """Gate and up are as wide as what goes into `down`: elsewhere one of them is repeated. `down` leads back to x."""
    (width, first), (inner, output) = gate_up.widths, down.widths
    second = first if up is None else up.widths[1]
    hidden = 2 * inner if layout in ("concatenated", "interleaved") else inner
    return same_size(first, hidden) and same_size(second, hidden) and same_size(output, width)


def _one_layout(linears: tuple[Linear | None, ...]) -> bool:
    return len({linear.transposed for linear in linears if linear is not None}) == 1


def _is_low_rank(linear: Linear | None) -> bool:
    """Whether the product is cheaper in its parts, which only the general rewrite has."""
    return linear is not None and low_rank(linear.weight) is not None


def _uncast(value: Value) -> Value:
    """`value` before casts of floating point rows."""
    while isinstance(value, Op) and value.name in _CASTS and isinstance(value.args[0], Op) and _is_float_cast(value):
        value = value.args[0]
    return value


def _is_float_cast(op: Op) -> bool:
    """Whether `op` casts between dtypes in which combining in fp32 may as well be done without it."""
    before, after = fake_tensor(op.args[0].node), fake_tensor(op.node)
    return before is not None and after is not None and {before.dtype, after.dtype} <= _FLOATS


def _uncast_exact(value: Value) -> Value:
    """Without a cast that widens the rows before they are weighted: combining is done in fp32 anyway."""
    if isinstance(value, Op) and value.name in _CASTS and isinstance(value.args[0], Op) and _is_float_cast(value):
        before, after = fake_tensor(value.args[0].node), fake_tensor(value.node)
        if before is not None and after is not None and before.dtype.itemsize <= after.dtype.itemsize:
            return value.args[0]
    return value


def _is_cast_of_slots(op: Op) -> bool:
    return op.name in _CASTS and isinstance(op.args[0], (SlotGathered, Op)) and _is_float_cast(op)


def _is_column(op: Op) -> bool:
    if op.name not in ("unsqueeze", "view", "reshape"):
        return False
    before, after = fake_tensor(op.node.all_input_nodes[0]), fake_tensor(op.node)
    if before is None or after is None or not isinstance(op.args[0], (SlotGathered, Op)):
        return False
    return after.dim() == 2 and after.shape[1] == 1 and (before.dim() == 1 or same_sizes(before.shape, after.shape))
