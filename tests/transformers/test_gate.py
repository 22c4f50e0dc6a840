"""A gate is known by what it computes: near misses are not recognised, and a change after compile is noticed."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fx_passes.modules.gate import Gate, inputs_of, recognise
from tests.backend.harness import fresh_dynamo


def gate_of(module, dtype=torch.float32):
    return recognise(inputs_of(module, "_apply_gate"), 8, dtype)


class Experts(nn.Module):
    def __init__(self, act_fn=F.silu, **attributes):
        super().__init__()
        self.act_fn = act_fn
        vars(self).update(attributes)

    def _apply_gate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def experts(gate, act_fn=F.silu, **attributes):
    """An instance of a class with this gate."""
    return type("Experts", (Experts,), {"_apply_gate": gate})(act_fn, **attributes)


def interleaved(self, h):
    return h[..., 1::2] * self.act_fn(h[..., ::2])


def by_width(self, h):
    width = h.shape[-1] // 2
    return F.gelu(h[:, :width], approximate="tanh") * h[:, width:]


def clamped(self, h):
    gate, up = h.chunk(2, dim=-1)
    gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
    return (1.0 + up) * (gate * torch.sigmoid(gate * self.alpha))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Experts(), Gate("silu", "concatenated")),
        (Experts(nn.GELU("tanh")), Gate("gelu_tanh", "concatenated")),
        (Experts(functools.partial(F.gelu, approximate="none")), Gate("gelu", "concatenated")),
        (experts(interleaved, F.relu), Gate("relu", "interleaved")),
        (experts(by_width), Gate("gelu_tanh", "concatenated")),
        (experts(clamped, limit=3.0, alpha=1.5), Gate("clamped_swiglu", "concatenated", 1.5, 3.0)),
    ],
)
def test_recognised(module, expected):
    assert gate_of(module) == expected


def two_gates(self, h):
    gate, _ = h.chunk(2, dim=-1)
    return self.act_fn(gate) * gate


def three_parts(self, h):
    gate, up, _ = h.split([4, 3, 1], dim=-1)
    return self.act_fn(gate[:, :3]) * up


def overlapping(self, h):
    return self.act_fn(h[:, :4]) * h[:, 3:7]


def up_first(self, h):
    up, gate = h.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def along_rows(self, h):
    gate, up = h.chunk(2, dim=0)
    return self.act_fn(gate) * up


def scaled(self, h):
    gate, up = h.chunk(2, dim=-1)
    return self.act_fn(gate) * up * self.scale


def unequal_limits(self, h):
    gate, up = h.chunk(2, dim=-1)
    gate, up = gate.clamp(max=self.limit), up.clamp(min=-2 * self.limit, max=self.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def written_in_place(self, h):
    gate, up = h.chunk(2, dim=-1)
    F.silu(gate, inplace=True)
    return F.silu(h.chunk(2, dim=-1)[0]) * up


def counting(self, h):
    self.calls = self.calls + 1
    return Experts._apply_gate(self, h)


def by_name(self, h):
    gate, up = h.chunk(2, dim=-1)
    return getattr(self, "act" + "_fn")(gate) * up


def by_value(self, h):
    gate, up = h.chunk(2, dim=-1)
    return self.act_fn(gate) * up if gate.sum() > 0 else up


def by_configuration(self, h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up if self.config["silu"] else F.relu(gate) * up


SILU = True


def by_variable_of_the_module(self, h):
    gate, up = h.chunk(2, dim=-1)
    return (F.silu if SILU else F.relu)(gate) * up


def act_by_variable(x):
    return F.silu(x) if SILU else F.relu(x)


def by_helper(self, h):
    gate, up = h.chunk(2, dim=-1)
    return act_by_variable(gate) * up


def with_a_closure():
    silu = True

    def by_cell(self, h):
        gate, up = h.chunk(2, dim=-1)
        return (F.silu if silu else F.relu)(gate) * up

    return experts(by_cell)


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return F.silu(x + self.bias)


def hooked():
    act_fn = nn.SiLU()
    act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    return Experts(act_fn)


def with_a_forward_of_its_own():
    act_fn = nn.SiLU()
    act_fn.forward = F.relu
    return Experts(act_fn)


def with_a_gate_of_its_own():
    module = Experts()
    module._apply_gate = lambda h: h.chunk(2, dim=-1)[0]
    return module


@pytest.mark.parametrize(
    "module",
    [
        experts(two_gates),
        experts(three_parts),
        experts(overlapping),
        experts(up_first),
        experts(along_rows),
        experts(scaled, scale=2.0),
        experts(unequal_limits, limit=3.0, alpha=1.5),
        experts(written_in_place),
        experts(counting, calls=0),
        experts(by_name),
        experts(by_value),
        experts(by_configuration, config={"silu": True}),
        experts(by_variable_of_the_module),
        experts(by_helper),
        with_a_closure(),
        Experts(act_by_variable),
        Experts(functools.partial(act_by_variable)),
        Experts(Biased()),
        Experts(nn.SiLU(inplace=True)),
        Experts(nn.Hardswish()),
        Experts(nn.Softmax(dim=-1)),
        Experts(F.dropout),
        hooked(),
        with_a_forward_of_its_own(),
        with_a_gate_of_its_own(),
    ],
    ids=lambda module: getattr(type(module)._apply_gate, "__name__", None) if type(module) is not Experts else None,
)
def test_near_miss(module):
    assert gate_of(module) is None


def test_a_wider_type_in_between_counts():
    """In float32 a cast to float32 is nothing, in bfloat16 it is an operation of its own."""

    def in_float(self, h):
        gate, up = h.chunk(2, dim=-1)
        return (self.act_fn(gate.float()) * up.float()).to(h.dtype)

    assert gate_of(experts(in_float)) == Gate("silu", "concatenated")
    assert gate_of(experts(in_float), torch.bfloat16) is None


class Layer(nn.Module):
    """What is recognised, as the result of a compiled function."""

    def __init__(self, module):
        super().__init__()
        self.experts = module

    def forward(self, h):
        gate = recognise(inputs_of(self.experts, "_apply_gate"), h.shape[-1], h.dtype)
        return h + (1.0 if gate is None else gate.limit if gate.activation == "clamped_swiglu" else 2.0)


@pytest.mark.parametrize("backend", ["eager"])
def test_changes_after_compile_are_noticed(backend):
    fresh_dynamo()
    h = torch.zeros(2, 8)
    layer = Layer(experts(clamped, limit=3.0, alpha=1.5))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert compiled(h)[0, 0] == 3.0
    layer.experts.limit = 5.0
    assert compiled(h)[0, 0] == 5.0

    layer.experts = Experts(nn.SiLU())
    assert compiled(h)[0, 0] == 2.0
    layer.experts.act_fn = nn.Hardswish()
    assert compiled(h)[0, 0] == 1.0
    layer.experts.act_fn = nn.GELU()
    assert compiled(h)[0, 0] == 2.0
    layer.experts._apply_gate = lambda h: h
    assert compiled(h)[0, 0] == 1.0
