"""The table of layers: each with its inputs and the loop over experts that it must equal.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scatter_moe import Dispatch, ExpertList, ExpertMLP, MixtureOfAttention, MoE, ParallelLinear, from_modules
from scatter_moe.routers import Routing

T, K, E, D, WIDTH = 256, 2, 8, 64, 64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


@dataclass(frozen=True)
class Case:
    """make() is the layer in float32, inputs(seed) its inputs (floats in float64), naive(layer, *inputs) loops."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    naive: Callable[..., Tensor]

    def __str__(self) -> str:
        return self.name

    def module(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(device, dtype)

    def arguments(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """Leaves; those of floating point require gradients."""
        return [
            t.to(device, dtype).requires_grad_() if t.is_floating_point() else t.to(device) for t in self.inputs(seed)
        ]


def results(call: Callable[..., Tensor], module: nn.Module, arguments: list[Tensor]) -> dict[str, Tensor | None]:
    """Output and all gradients by name, from unit-scale random upstream gradients."""
    module.zero_grad()
    for argument in arguments:
        argument.grad = None
    out = call(*arguments)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    grads |= {f"argument {i}": argument.grad for i, argument in enumerate(arguments) if argument.requires_grad}
    return {"out": out.detach(), **grads}


def ids(generator: torch.Generator, choices: int = E) -> Tensor:
    """Distinct experts for each token; the last expert gets no token."""
    return torch.rand(T, choices - 1, generator=generator).argsort(dim=1)[:, :K]


def routed_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64)
    return x, ids(generator), torch.rand(T, K, generator=generator, dtype=torch.float64)


def inputs_with_sentinels(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x, topk_ids, topk_weights = routed_inputs(seed)
    return x, topk_ids.index_fill(0, torch.arange(0, T, 5), E), topk_weights


def grouped_inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, T // E, (E,), generator=generator)
    return torch.randn(T, D, generator=generator, dtype=torch.float64), counts


def x_alone(seed: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, T // 2, D, generator=generator, dtype=torch.float64),)


def expert(layer: ExpertMLP, x: Tensor, e: int) -> Tensor:
    """One expert of an ExpertMLP, as one would write it."""

    def linear(name: str, rows: Tensor) -> Tensor:
        bias = getattr(layer, f"{name}_bias")
        return F.linear(rows, getattr(layer, name)[e], None if bias is None else bias[e])

    act = ACTIVATIONS.get(layer.activation, F.silu)
    if layer.layout == "plain":
        return linear("down_proj", act(linear("up_proj", x)))
    if layer.layout == "separate":
        gate, up = linear("gate_proj", x), linear("up_proj", x)
    elif layer.layout == "concatenated":
        gate, up = linear("gate_up_proj", x).chunk(2, dim=-1)
    else:
        gate, up = linear("gate_up_proj", x)[:, ::2], linear("gate_up_proj", x)[:, 1::2]
    if layer.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
        return linear("down_proj", (up + 1) * gate * torch.sigmoid(layer.alpha * gate))
    return linear("down_proj", act(gate) * up)


def mlp_loop(layer: ExpertMLP, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        scale = topk_weights[token, slot, None]
        if layer.weight_on == "input":
            y = expert(layer, (x[token] * scale).to(x.dtype), e)
        else:
            y = expert(layer, x[token], e) * scale
        out = out.index_add(0, token, y.to(out.dtype))
    return out


class Grouped(nn.Module):
    """`forward_grouped` as a forward."""

    def __init__(self, mlp: ExpertMLP) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return self.mlp.forward_grouped(x, num_tokens_per_expert)


def grouped_loop(layer: Grouped, x: Tensor, counts: Tensor) -> Tensor:
    sizes = [*counts.tolist(), x.shape[0] - int(counts.sum())]
    *parts, rest = x.split(sizes)
    return torch.cat([*(expert(layer.mlp, part, e) for e, part in enumerate(parts)), torch.zeros_like(rest)])


class FixedChoice(nn.Module):
    """A router whose choice doesn't depend on x (rounding can't flip it), while its weights do."""

    def __init__(self, width: int = D, num_experts: int = E, top_k: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Routing:
        rows, num_experts = torch.arange(x.shape[0], device=x.device)[:, None], self.weight.shape[0]
        topk_ids = (rows * 3 + torch.arange(self.top_k, device=x.device)) % num_experts
        logits = F.linear(x, self.weight)
        return Routing(logits.sigmoid().gather(1, topk_ids), topk_ids, logits)


def moe_loop(layer: MoE, x: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    routed = layer.router(rows)
    y = mlp_loop(layer.experts, rows, routed.topk_ids, routed.topk_weights)
    return (y + layer.shared_expert(rows)).view_as(x) if layer.shared_expert is not None else y.view_as(x)


class CustomExpert(nn.Module):
    """A norm within each expert, between two parallel linear layers; rows pass grouped, then in slot order."""

    def __init__(self) -> None:
        super().__init__()
        self.up = ParallelLinear(E, D, WIDTH)
        self.middle = ParallelLinear(E, WIDTH, WIDTH, bias=False)
        self.down = ParallelLinear(E, WIDTH, D)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        dispatch = Dispatch.of_ids(topk_ids, E)
        h = F.tanh(self.up(x, dispatch, rows_out="grouped"))
        h = F.layer_norm(self.middle(h, dispatch, rows_in="grouped"), (WIDTH,))
        y = self.down(h, dispatch, rows_in="slots").unflatten(0, (-1, K))
        return (y * topk_weights[..., None]).sum(1)


def custom_loop(layer: CustomExpert, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(topk_ids == e)
        h = F.tanh(F.linear(x[token], layer.up.weight[e], layer.up.bias[e]))
        h = F.layer_norm(F.linear(h, layer.middle.weight[e]), (WIDTH,))
        y = F.linear(h, layer.down.weight[e], layer.down.bias[e])
        out = out.index_add(0, token, y * topk_weights[token, slot, None])
    return out


HEADS, HEAD_DIM, BATCH = 2, 16, 8


def attention_inputs(seed: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(BATCH, T // BATCH, D, generator=generator, dtype=torch.float64),)


def padded_inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Two sequences have padding, on the left and on the right."""
    (x,) = attention_inputs(seed)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, :5], mask[2, -3:] = False, False
    return x, mask


def attention_loop(layer: MixtureOfAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each expert as a layer of attention of its own, for all tokens; each token then takes what its experts gave."""
    length = x.shape[1]
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    key = torch.arange(length, device=x.device)
    allowed = mask[:, None] & (key <= key[:, None]) if layer.causal else mask[:, None].expand(-1, length, -1)
    allowed = (allowed | torch.eye(length, dtype=torch.bool, device=x.device))[:, None]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)

    def heads(rows: Tensor) -> Tensor:
        return rows.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)

    def turned(rows: Tensor) -> Tensor:
        return rows if layer.rope_theta is None else rope(rows, positions, layer.rope_theta)

    def bias(layer: ParallelLinear, e: int) -> Tensor | None:
        return None if layer.bias is None else layer.bias[e]

    keys, values = turned(heads(layer.k_proj(x))), heads(layer.v_proj(x))
    routed, out = layer.router(x.flatten(0, 1)), torch.zeros_like(x)
    for e in range(E):
        q = turned(heads(F.linear(x, layer.q_proj.weight[e], bias(layer.q_proj, e))))
        scores = (q @ keys.transpose(2, 3) / HEAD_DIM**0.5).masked_fill(~allowed, -torch.inf)
        y = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        y = F.linear(y, layer.o_proj.weight[e], bias(layer.o_proj, e))
        share = (routed.topk_weights * (routed.topk_ids == e)).sum(1)
        out = out + y * share.view(*x.shape[:2], 1)
    return out


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotation as multiplication of complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(torch.stack(x.to(turns.abs().dtype).chunk(2, dim=-1), dim=-1).contiguous()) * turns
    return torch.cat((pairs.real, pairs.imag), dim=-1).to(x.dtype)


def attention_case(name: str, inputs: Callable[[int], tuple[Tensor, ...]], **options: Any) -> Case:
    def make() -> MixtureOfAttention:
        return MixtureOfAttention(FixedChoice(), D, E, HEADS, HEAD_DIM, **options)

    return Case(name, make, inputs, attention_loop)


class Expert(nn.Module):
    """An expert as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, D, bias=False)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


def modules_loop(layer: ExpertList, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e, module in enumerate(layer):
        token, slot = torch.where(topk_ids == e)
        out = out.index_add(0, token, module(x[token]) * topk_weights[token, slot, None])
    return out


def mlp_case(name: str, inputs: Callable[[int], tuple[Tensor, ...]] = routed_inputs, **options: Any) -> Case:
    return Case(name, lambda: ExpertMLP(E, D, WIDTH, **options), inputs, mlp_loop)


def _moe(shared: bool) -> MoE:
    shared_expert = nn.Sequential(nn.Linear(D, D, bias=False), nn.Tanh()) if shared else None
    return MoE(FixedChoice(), ExpertMLP(E, D, WIDTH), shared_expert)


CASES = (
    Case("parallel_linear", CustomExpert, routed_inputs, custom_loop),
    mlp_case("mlp"),
    mlp_case("mlp-sentinels", inputs_with_sentinels, bias=True, layout="separate", activation="gelu_tanh"),
    mlp_case("mlp-plain", layout="plain", activation="relu2", bias=True),
    mlp_case("mlp-clamped", layout="interleaved", activation="clamped_swiglu", bias=True, limit=0.75),
    mlp_case("mlp-weight-on-input", weight_on="input", activation="gelu"),
    Case("mlp-grouped", lambda: Grouped(ExpertMLP(E, D, WIDTH, bias=True)), grouped_inputs, grouped_loop),
    Case("moe", lambda: _moe(shared=False), x_alone, moe_loop),
    Case("moe-shared-expert", lambda: _moe(shared=True), x_alone, moe_loop),
    Case("from_modules", lambda: from_modules([Expert() for _ in range(E)]), inputs_with_sentinels, modules_loop),
    attention_case("attention", attention_inputs),
    attention_case("attention-not-causal", attention_inputs, causal=False),
    attention_case("attention-padding-rope", padded_inputs, rope_theta=1e4),
)
