"""The table of operator cases: one row drives every test of the operators.

A row names the operator, how tokens are routed, how parameters are stored and the options; `Case.arguments` makes the
operator's arguments of any size and dtype from it. Tensors are of unit scale; those that take part in differentiation
require a gradient.

T tokens, K experts per token, N = T * K slots, E experts, D model width, F expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import registrations  # noqa: F401  registers the operators

OPS = torch.ops.scatter_moe
RANK = 2  # of adapters


@dataclass(frozen=True)
class Sizes:
    T: int = 7
    K: int = 2
    E: int = 4
    D: int = 5
    F: int = 3


ROUTINGS: dict[str, Callable[[Sizes, torch.Generator], Tensor]] = {
    "balanced": lambda s, g: torch.rand(s.T, s.E, generator=g).topk(s.K).indices,
    "skewed": lambda s, g: (torch.rand(s.T, s.E, generator=g) / torch.arange(1, s.E + 1)).topk(s.K).indices,
    "empty experts": lambda s, g: torch.randint(0, (s.E + 1) // 2, (s.T, s.K), generator=g) * 2,
    "one expert": lambda s, g: torch.full((s.T, s.K), s.E - 1),
    "duplicates": lambda s, g: torch.randint(0, s.E, (s.T, 1), generator=g).expand(s.T, s.K),
    "sentinels": lambda s, g: torch.randint(-2, s.E + 3, (s.T, s.K), generator=g),
    "only sentinels": lambda s, g: torch.full((s.T, s.K), s.E),
}


@dataclass(frozen=True)
class Case:
    op: str
    routing: str = "balanced"
    parameters: str = "stacked"  # or "list", "view" (a transposed view), "strided" (no dimension is dense), "expanded"
    transposed: bool = False
    bias: bool = False
    strided_inputs: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = [name for name in ("transposed", "bias", "strided_inputs") if getattr(self, name)]
        values = [f"{name}={value}" for name, value in (*self.options.items(), *self.sizes.items())]
        return "-".join([self.op, self.routing, self.parameters, *flags, *values]).replace(" ", "_")

    def arguments(
        self, sizes: Sizes = Sizes(), dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0
    ) -> tuple:
        """Positional arguments of the operator; by default in the widest dtype that the device's kernels have."""
        dtype = dtype or (torch.float64 if device == "cpu" else torch.float32)
        maker = Maker(self, replace(sizes, **self.sizes), dtype, device, torch.Generator().manual_seed(seed))
        return ARGUMENTS[self.op](maker)

    @property
    def differentiable(self) -> bool:
        return self.op not in ("route", "mlp_backward", "mlp_backward_")


class Maker:
    """Makes the tensors of one case."""

    def __init__(self, case: Case, sizes: Sizes, dtype: torch.dtype, device: str, generator: torch.Generator) -> None:
        self.case, self.sizes, self.dtype, self.device, self.generator = case, sizes, dtype, device, generator
        self.options = case.options
        self.ids = ROUTINGS[case.routing](sizes, generator).to(device)
        self.num_slots = sizes.T * sizes.K

    def routing(self) -> tuple[Tensor, Tensor]:
        return OPS.route(self.ids, self.sizes.E)

    def rows(self, *shape: int) -> Tensor:
        """An activation."""
        if not self.case.strided_inputs:
            return self._tensor(*shape).requires_grad_()
        padded = self._tensor(*(2 * size for size in shape))
        return padded[tuple(slice(None, None, 2) for _ in shape)].detach().requires_grad_()

    def topk_weights(self) -> Tensor:
        weights = torch.rand(self.sizes.T, self.sizes.K, generator=self.generator, dtype=torch.float64)
        return weights.to(self.device, self.options.get("topk_dtype", self.dtype)).requires_grad_()

    def weight(self, num_out: int, num_in: int) -> list[Tensor]:
        shape = (num_in, num_out) if self.case.transposed else (num_out, num_in)
        return self._parameter(*shape, scale=max(1, num_in) ** -0.5)

    def bias(self, num_out: int) -> list[Tensor]:
        return self._parameter(num_out, scale=1.0) if self.case.bias else []

    def _parameter(self, *shape: int, scale: float) -> list[Tensor]:
        E, storage = self.sizes.E, self.case.parameters
        if storage == "list":
            return [(scale * self._tensor(*shape)).requires_grad_() for _ in range(E)]
        if storage == "view":
            stacked = self._tensor(E, *reversed(shape)).transpose(1, -1)
        elif storage == "strided":
            stacked = self._tensor(E, *(2 * size for size in shape))[
                (slice(None), *(slice(None, None, 2) for _ in shape))
            ]
        elif storage == "expanded":
            stacked = self._tensor(1, *shape).expand(E, *shape)
        else:
            stacked = self._tensor(E, *shape)
        return [(stacked if storage == "expanded" else stacked.mul_(scale)).detach().requires_grad_()]

    def _tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)


def _linear(m: Maker) -> tuple:
    s, grouped_in = m.sizes, m.options["grouped_in"]
    x = m.rows(m.num_slots if grouped_in else s.T, s.D)
    layout = (*m.routing(), s.K, grouped_in, m.options["grouped_out"])
    return x, m.weight(s.F, s.D), *layout, m.bias(s.F), m.case.transposed


def _adapted(m: Maker) -> tuple:
    s, grouped_in = m.sizes, m.options["grouped_in"]
    x = m.rows(m.num_slots if grouped_in else s.T, s.D)
    (weight,) = m.weight(s.F, s.D)
    scale = max(1, s.D) ** -0.25 / 3.5  # of each factor: they add about a tenth of the weights' size
    lhs, rhs = (m._parameter(*sizes, scale=scale)[0] for sizes in ((weight.shape[1], RANK), (RANK, weight.shape[2])))
    layout = (s.K, grouped_in, m.options["grouped_out"])
    return x, weight, lhs, rhs, *m.routing(), 1.5, *layout, m.bias(s.F), m.case.transposed


def _adapted_grads(m: Maker) -> tuple:
    x, _, lhs, rhs, *rest, _, transposed = _adapted(m)
    needs = (m.options.get("need_lhs", True), m.options.get("need_rhs", True))
    return x, m.rows(m.num_slots, m.sizes.F), lhs, rhs, *rest, transposed, *needs


def _weight_grad(m: Maker) -> tuple:
    s, grouped_in = m.sizes, m.options["grouped_in"]
    x = m.rows(m.num_slots if grouped_in else s.T, s.D)
    layout = (*m.routing(), s.K, grouped_in, m.options["grouped_out"])
    return x, m.rows(m.num_slots, s.F), *layout, m.case.transposed


def _combine(m: Maker) -> tuple:
    topk_weights = None if m.options.get("weights") is False else m.topk_weights()
    options = (m.sizes.K, m.options["grouped_in"], m.options.get("out_dtype"))
    return m.rows(m.num_slots, m.sizes.D), topk_weights, *m.routing(), *options


def _combine_backward(m: Maker) -> tuple:
    y, topk_weights, order, offsets, top_k, grouped_in, _ = _combine(m)
    needs = (m.options.get("need_y", True), m.options.get("need_weights", topk_weights is not None))
    return m.rows(m.sizes.T, m.sizes.D), y, topk_weights, order, offsets, top_k, grouped_in, *needs


def _expand(m: Maker) -> tuple:
    arguments = m._parameter(*m.options.get("rest", (m.sizes.D,)), scale=1.0), m.routing()[1], m.num_slots
    return (*arguments, m.options["out_dtype"]) if "out_dtype" in m.options else arguments


def _mlp(m: Maker) -> tuple:
    s, layout = m.sizes, m.options["layout"]
    width = 2 * s.F if layout in ("concatenated", "interleaved") else s.F
    separate = layout == "separate"
    weights = (m.weight(width, s.D), m.weight(s.F, s.D) if separate else [], m.weight(s.D, s.F))
    without = m.options.get("without", ())
    biases = [m.bias(width), m.bias(s.F) if separate else [], m.bias(s.D)]
    biases = [[] if name in without else bias for name, bias in zip(("gate_up", "up", "down"), biases, strict=True)]
    limits = (m.options.get("alpha", 1.702), m.options.get("limit", 1.0))
    options = (m.options["activation"], layout, m.case.transposed, m.options.get("weight_on", "output"), *limits)
    return m.rows(s.T, s.D), m.topk_weights(), *m.routing(), *weights, *biases, *options, m.options.get("out_dtype")


def _mlp_backward(m: Maker) -> tuple:
    with torch.no_grad():
        arguments = _mlp(m)
        keep_y = m.options.get("keep_y", m.options.get("weight_on") != "input")
        out, h, y = OPS.mlp_forward(*arguments, True, keep_y)
    arguments = [[t.detach() for t in a] if isinstance(a, list) else a for a in arguments]
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    needs = m.options.get("needs", [bool(a) if isinstance(a, list) else True for a in (True, True, *arguments[4:10])])
    return m._tensor(*out.shape).to(out.dtype), h, y if keep_y else None, *arguments, needs


ARGUMENTS: dict[str, Callable[[Maker], tuple]] = {
    "route": lambda m: (m.ids.to(m.options.get("ids_dtype", torch.int64)), m.sizes.E),
    "dispatch": lambda m: (m.rows(m.sizes.T, m.sizes.D), *m.routing(), m.sizes.K),
    "parallel_linear": _linear,
    "adapted_linear": _adapted,
    "adapted_linear_forward": _adapted,
    "adapted_linear_grads": _adapted_grads,
    "parallel_linear_weight_grad": _weight_grad,
    "parallel_linear_bias_grad": lambda m: (
        m.rows(m.num_slots, m.sizes.F),
        *m.routing(),
        m.options["grouped_out"],
    ),
    "combine": _combine,
    "combine_backward": _combine_backward,
    "expand": _expand,
    "expand_backward": lambda m: (m.rows(m.num_slots, m.sizes.D), m.routing()[1]),
    "mlp": _mlp,
    "mlp_forward": lambda m: (*_mlp(m), True, True),
    "mlp_backward": _mlp_backward,
    "mlp_backward_": _mlp_backward,
}


def _layout(grouped_in: bool, grouped_out: bool) -> dict[str, Any]:
    return {"grouped_in": grouped_in, "grouped_out": grouped_out}


def _expert(activation: str, layout: str, **more: Any) -> dict[str, Any]:
    return {"activation": activation, "layout": layout, **more}


SCATTERED, GROUPED = _layout(False, False), _layout(True, True)
SILU = _expert("silu", "concatenated")
ONLY_DOWN_BIAS = [False] * 7 + [True]

CASES: Sequence[Case] = (
    Case("route"),
    Case("route", "skewed", options={"ids_dtype": torch.int32}),
    Case("route", "empty experts"),
    Case("route", "duplicates"),
    Case("route", "sentinels"),
    Case("route", sizes={"T": 0}),
    Case("route", sizes={"K": 4}),
    Case("dispatch"),
    Case("dispatch", "sentinels", strided_inputs=True),
    Case("dispatch", "only sentinels"),
    Case("dispatch", sizes={"T": 0}),
    Case("parallel_linear", options=SCATTERED),
    Case("parallel_linear", "skewed", bias=True, options=_layout(False, True)),
    Case("parallel_linear", parameters="list", bias=True, options=_layout(True, False)),
    Case("parallel_linear", "empty experts", parameters="list", transposed=True, options=GROUPED),
    Case("parallel_linear", parameters="view", bias=True, options=SCATTERED),
    Case("parallel_linear", parameters="strided", transposed=True, strided_inputs=True, options=_layout(False, True)),
    Case("parallel_linear", parameters="expanded", options=GROUPED, strided_inputs=True),
    Case("parallel_linear", "one expert", transposed=True, bias=True, options=SCATTERED),
    Case("parallel_linear", "duplicates", options=SCATTERED),
    Case("parallel_linear", "sentinels", bias=True, options=SCATTERED),
    Case("parallel_linear", "sentinels", bias=True, options=GROUPED),
    Case("parallel_linear", options=SCATTERED, sizes={"T": 1}),
    Case("parallel_linear", bias=True, options=_layout(False, True), sizes={"T": 0}),
    Case("parallel_linear", options=SCATTERED, sizes={"K": 4}),
    Case("parallel_linear", options=SCATTERED, sizes={"K": 1}),
    Case("parallel_linear", options=SCATTERED, sizes={"K": 1, "E": 1}),
    Case("adapted_linear", options=SCATTERED),
    Case("adapted_linear", "sentinels", parameters="view", bias=True, transposed=True, options=_layout(False, True)),
    Case("adapted_linear", "empty experts", strided_inputs=True, bias=True, options=GROUPED),
    Case("adapted_linear", "duplicates", parameters="strided", transposed=True, options=_layout(True, False)),
    Case("adapted_linear", parameters="expanded", options=GROUPED),
    Case("adapted_linear", "only sentinels", bias=True, options=SCATTERED),
    Case("adapted_linear", options=GROUPED, sizes={"T": 0}),
    Case("adapted_linear", options=_layout(False, True), sizes={"T": 1}),
    Case("adapted_linear", options=_layout(False, True), sizes={"K": 1, "E": 1}),
    Case("adapted_linear_forward", "sentinels", bias=True, options=SCATTERED),
    Case("adapted_linear_grads", options=_layout(False, True)),
    Case("adapted_linear_grads", "sentinels", transposed=True, options=SCATTERED),
    Case("adapted_linear_grads", "empty experts", options=GROUPED | {"need_lhs": False}),
    Case("adapted_linear_grads", strided_inputs=True, options=_layout(True, False) | {"need_rhs": False}),
    Case("adapted_linear_grads", options=_layout(False, True), sizes={"T": 1}),
    Case("parallel_linear_weight_grad", options=SCATTERED),
    Case(
        "parallel_linear_weight_grad", "sentinels", transposed=True, strided_inputs=True, options=_layout(False, True)
    ),
    Case("parallel_linear_weight_grad", "empty experts", options=_layout(True, False)),
    Case("parallel_linear_weight_grad", options=GROUPED, sizes={"T": 0}),
    Case("parallel_linear_bias_grad", "sentinels", options={"grouped_out": False}),
    Case("parallel_linear_bias_grad", "empty experts", strided_inputs=True, options={"grouped_out": True}),
    Case("combine", options={"grouped_in": True}),
    Case("combine", options={"grouped_in": False, "weights": False}),
    Case("combine", "duplicates", strided_inputs=True, options={"grouped_in": False}),
    Case("combine", "sentinels", options={"grouped_in": True, "out_dtype": torch.float64}),
    Case("combine", "only sentinels", options={"grouped_in": True}),
    Case("combine", options={"grouped_in": True, "topk_dtype": torch.float32}, sizes={"K": 4}),
    Case("combine", options={"grouped_in": True}, sizes={"T": 0}),
    Case("combine_backward", "sentinels", options={"grouped_in": True}),
    Case("combine_backward", strided_inputs=True, options={"grouped_in": False, "need_y": False}),
    Case("combine_backward", options={"grouped_in": True, "weights": False}),
    Case("expand"),
    Case("expand", "sentinels", parameters="list"),
    Case("expand", "empty experts", options={"rest": ()}),
    Case("expand", options={"rest": (2, 3)}, sizes={"T": 0}),
    Case("expand", parameters="list", options={"out_dtype": torch.float64}),
    Case("expand_backward", "sentinels"),
    Case("expand_backward", "empty experts", strided_inputs=True),
    Case("mlp", options=SILU),
    Case("mlp", "skewed", bias=True, options=_expert("gelu", "interleaved")),
    Case("mlp", "empty experts", parameters="list", bias=True, options=_expert("gelu_tanh", "separate")),
    Case("mlp", "duplicates", parameters="view", options=_expert("relu", "plain")),
    Case("mlp", "sentinels", bias=True, options=_expert("relu2", "plain")),
    Case("mlp", transposed=True, bias=True, options=_expert("clamped_swiglu", "interleaved")),
    Case("mlp", "one expert", parameters="list", transposed=True, options=_expert("clamped_swiglu", "separate")),
    Case("mlp", parameters="strided", strided_inputs=True, options=_expert("silu", "separate")),
    Case("mlp", "sentinels", bias=True, options=_expert("silu", "separate", weight_on="input")),
    Case("mlp", options=_expert("gelu", "plain", weight_on="input")),
    Case("mlp", bias=True, options=_expert("silu", "separate", weight_on="input", without=("up",))),
    Case("mlp", bias=True, options=_expert("silu", "separate", without=("gate_up", "down"))),
    Case("mlp", options=_expert("silu", "concatenated", topk_dtype=torch.float32, out_dtype=torch.float64)),
    Case("mlp", options=SILU, sizes={"T": 0}),
    Case("mlp", bias=True, options=SILU, sizes={"T": 1}),
    Case("mlp", "duplicates", bias=True, options=SILU, sizes={"T": 1}),
    Case("mlp", "sentinels", bias=True, options=_expert("silu", "separate", weight_on="input"), sizes={"T": 1, "K": 5}),
    Case("mlp", "only sentinels", bias=True, options=SILU),
    Case("mlp", options=SILU, sizes={"K": 4}),
    Case("mlp", options=SILU, sizes={"K": 1, "E": 1}),
    Case("mlp_forward", "sentinels", bias=True, options=SILU),
    Case("mlp_backward", "sentinels", bias=True, options=SILU),
    Case("mlp_backward", "sentinels", bias=True, options=SILU | {"keep_y": False}),
    Case("mlp_backward", parameters="list", options=_expert("silu", "separate", weight_on="input")),
    Case("mlp_backward", bias=True, options=SILU | {"needs": ONLY_DOWN_BIAS}),
    Case("mlp_backward_", "sentinels", bias=True, options=SILU),
)


def differentiable_inputs(arguments: tuple) -> list[Tensor]:
    """The tensors of the arguments that require a gradient, lists opened."""
    flat = [tensor for a in arguments for tensor in (a if isinstance(a, list) else [a])]
    return [tensor for tensor in flat if isinstance(tensor, Tensor) and tensor.requires_grad]


def map_tensors(function: Callable[[Tensor], Tensor], arguments: tuple) -> tuple:
    """Arguments with `function` applied to each tensor, lists opened."""
    return tuple(
        [function(tensor) for tensor in a]
        if isinstance(a, list) and all(isinstance(t, Tensor) for t in a)
        else function(a)
        if isinstance(a, Tensor)
        else a
        for a in arguments
    )
