"""Is the expert body a (gated) MLP with the router weight on its output or input? Then one fused op computes it.

    gate, up = halves of x W_gate_up^T + b          y = (act(gate) * up) W_down^T + b          out += s * y

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from dataclasses import dataclass

from torch import fx

from fx_passes.body.activation_body import match_activation
from fx_passes.body.linear_body import Linear, as_linear, same_rows
from fx_passes.body.low_rank import low_rank
from fx_passes.body.values import Body, Gathered, Op, SlotGathered, rank
from fx_passes.body.weighted_body import without_router_weight
from fx_passes.graph.ops import same_size


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
    if not isinstance(x, Gathered) or x.leading or (up is not None and not same_rows(up.rows, gate_up.rows)):
        return None
    if not _one_layout((gate_up, up, down)) or rank(x) != 2 or any(map(_is_low_rank, (gate_up, up, down))):
        return None
    if not _have_widths_of_an_mlp(gate_up, up, down, layout):
        return None
    return Mlp(x.source, weights, weight_on, gate_up, up, down, activation, layout, **numbers)


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
    return linear is not None and bool(low_rank(linear.weight))
