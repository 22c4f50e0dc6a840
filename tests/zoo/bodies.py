"""What an expert can be: any row-wise function, under a range loop and under a hit loop."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, SwiGLU


class RangeLoop(Block):
    """for e in range(E), torch.where on the one-hot mask, index_add_."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out.view_as(hidden_states)


class HitLoop(Block):
    """for e in hit, the same body."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        out = torch.zeros_like(x)
        for e in hit:
            slots, tokens = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out.view_as(hidden_states)


class NarrowLoop(Block):
    """The output is narrower than the input."""

    def __init__(self):
        super().__init__(partial(gelu_mlp, width=D // 2))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = x.new_zeros(x.shape[0], D // 2)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.repeat(1, 2).view_as(hidden_states)


class FusedSwiGLU(nn.Module):
    """One linear for gate and up."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Linear(D, 2 * FF, bias=False)
        self.down = nn.Linear(FF, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class OneGate(nn.Module):
    """One gate for all columns."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, 1), nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class UnevenHalves(nn.Module):
    """`chunk` of three columns gives two and one, which is repeated."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 3, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ClampedByTensors(Block):
    """The limits of a clamped SwiGLU are tensors."""

    def __init__(self):
        super().__init__(FusedSwiGLU)
        self.register_buffer("limit", torch.tensor(1.497))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            gate, up = expert.gate_up(x[tokens]).chunk(2, dim=-1)
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
            y = expert.down((up + 1) * (gate * torch.sigmoid(gate * 1.702)))
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class ReluSquared(nn.Module):
    """down(relu(up x)^2), no gate."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, FF, bias=False)
        self.down = nn.Linear(FF, D, bias=False)

    def forward(self, x):
        return self.down(torch.square(F.relu(self.up(x))))


class GeGLU(nn.Module):
    """gelu(gate) * up with biases everywhere."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class RMSNorm(nn.Module):
    """Norm of each row with a learned scale."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(variance + 1e-6)).to(x.dtype)


class NormAfter(nn.Module):
    """An MLP, then a norm of its own per expert."""

    def __init__(self):
        super().__init__()
        self.mlp, self.norm = SwiGLU(), RMSNorm()

    def forward(self, x):
        return self.norm(self.mlp(x))


class LoRALinear(nn.Module):
    """A frozen linear plus a low-rank update."""

    def __init__(self, fan_in, fan_out, rank=3):
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=False).requires_grad_(False)
        self.lora_a = nn.Linear(fan_in, rank, bias=False)
        self.lora_b = nn.Linear(rank, fan_out, bias=False)
        self.scaling = 0.5

    def forward(self, x):
        return self.base(x) + self.lora_b(self.lora_a(x)) * self.scaling


class LoRAExpert(nn.Module):
    """SwiGLU whose three linears all carry LoRA."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = LoRALinear(D, FF), LoRALinear(D, FF), LoRALinear(FF, D)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    """The expert adds to its own input."""

    def __init__(self):
        super().__init__()
        self.mlp = SwiGLU()

    def forward(self, x):
        return x + self.mlp(x)


class ScaleVector(nn.Module):
    """No linear at all: a learned vector per expert."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return torch.tanh(x * self.scale)


class Clamped(nn.Module):
    """A clamp on the hidden layer and a softcap on the way out."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x):
        return 3.0 * torch.tanh(self.down(self.up(x).clamp(-1.5, 1.5)) / 3.0)


def gelu_mlp(approximate="none", width=D):
    return nn.Sequential(nn.Linear(D, FF), nn.GELU(approximate=approximate), nn.Linear(FF, width))


def three_layers():
    return nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, FF), nn.ReLU(), nn.Linear(FF, D))


def norm_first():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, FF), nn.SiLU(), nn.Linear(FF, D))


def one_linear():
    return nn.Linear(D, D, bias=False)


def with_dropout():
    return nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Dropout(0.2), nn.Linear(FF, D))


def gate_shared_by_row():
    return nn.Sequential(nn.Linear(D, 2 * FF), nn.GLU(), nn.Linear(FF, D))


# name, expert, activation, op; frozen rows below hold for both loops
BODIES = (
    ("swiglu", SwiGLU, "silu", "mlp"),
    ("swiglu_fused", FusedSwiGLU, "silu", "mlp"),
    ("geglu_bias", GeGLU, "gelu", "mlp"),
    ("gelu_bias", gelu_mlp, "gelu", "mlp"),
    ("gelu_tanh", partial(gelu_mlp, "tanh"), "gelu_tanh", "mlp"),
    ("relu_squared", ReluSquared, "relu2", "mlp"),
    ("three_layers", three_layers, None, "parallel_linear"),
    ("layer_norm_first", norm_first, None, "parallel_linear"),
    ("rms_norm_after", NormAfter, None, "parallel_linear"),
    ("lora", LoRAExpert, None, "parallel_linear"),
    ("residual", Residual, None, None),
    ("clamped", Clamped, None, "parallel_linear"),
    ("one_linear", one_linear, None, "parallel_linear"),
    ("one_gate", OneGate, None, "parallel_linear"),
    ("uneven_halves", UnevenHalves, None, "parallel_linear"),
    ("sigmoid_glu", gate_shared_by_row, None, None),
)

CASES = (
    *(Case(f"range_{name}", partial(RangeLoop, expert), activation=act, op=op) for name, expert, act, op in BODIES),
    *(Case(f"hit_{name}", partial(HitLoop, expert), activation=act, op=op) for name, expert, act, op in BODIES),
    Case("range_narrow", NarrowLoop, activation=None, op="parallel_linear"),
    Case("range_clamped_by_tensors", ClampedByTensors, activation=None, op="parallel_linear"),
    Case("range_dropout_eval", partial(RangeLoop, with_dropout), activation="relu", op=None, train=False),
    Case("range_scale_vector", partial(RangeLoop, ScaleVector), activation=None, op=None, must_rewrite=False),
    Case("hit_identity", partial(HitLoop, nn.Identity), activation=None, op=None, must_rewrite=False),
)
