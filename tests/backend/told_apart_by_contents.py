"""Loops over all experts of which one differs from the others, or that change what experts hold."""

import torch
from torch import nn

from tests.backend.told_apart_by_number import Plain
from tests.near_misses.common import Loop
from tests.zoo.common import D, SwiGLU

FACTORS: dict[nn.Module, float] = {}


class Counting(SwiGLU):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class CountsCalls(Plain):
    def __init__(self):
        super().__init__(expert=Counting)


class CountsInBuffer(Plain):
    def __init__(self):
        super().__init__()
        for expert in self.experts:
            expert.register_buffer("calls", torch.zeros(()))

    def run(self, e, rows):
        self.experts[e].calls += 1
        return self.experts[e](rows)


class AsksForGradient(Plain):
    """The second expert has a gradient already."""

    def run(self, e, rows):
        has_gradient = self.experts[e].w1.weight.grad is not None
        return self.experts[e](rows) * (2.0 if has_gradient else 1.0)


class WritesParameter(Plain):
    def run(self, e, rows):
        with torch.no_grad():
            self.experts[e].w1.weight.mul_(0.5)
        return self.experts[e](rows)


class Penalised(Loop):
    """The norms of the experts' weights leave the loop."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        penalty = x.new_zeros(())
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            penalty = penalty + self.experts[e].w1.weight.norm()
        return out, penalty


class KeepsLast(Loop):
    """The loop's variables are read after it."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out + e + expert(x)


@torch.compiler.assume_constant_result
def factor_of(expert):
    return FACTORS.get(expert, 1.0)


class AsksAboutExpert(Plain):
    """What is asked about an expert while it is traced is asked about one expert."""

    def __init__(self):
        super().__init__()
        FACTORS.update({expert: 1.0 + e for e, expert in enumerate(self.experts)})

    def run(self, e, rows):
        return self.experts[e](rows) * factor_of(self.experts[e])


class HasFactor(SwiGLU):
    @torch.compiler.assume_constant_result
    def factor(self):
        return FACTORS.get(self, 1.0)


class AsksExpert(Plain):
    """The same, asked of the expert."""

    def __init__(self):
        super().__init__(expert=HasFactor)
        FACTORS.update({expert: 1.0 + e for e, expert in enumerate(self.experts)})

    def run(self, e, rows):
        return self.experts[e](rows) * self.experts[e].factor()


class Configured(SwiGLU):
    def __init__(self):
        super().__init__()
        self.config = None

    def forward(self, x):
        return super().forward(x) * self.config["rows"]["factor"]


class SharesConfig(Plain):
    """All experts read what the block writes before the loop, deep in an object of theirs."""

    def __init__(self):
        super().__init__(expert=Configured)
        self.config = {"rows": {"factor": 1.0}}
        for expert in self.experts:
            expert.config = self.config

    def begin(self, hidden_states):
        self.config["rows"]["factor"] = 3.0
        return super().begin(hidden_states)


class InSlot(SwiGLU):
    """A factor that is not among the attributes that `vars` shows."""

    __slots__ = ("factor",)

    def forward(self, x):
        try:
            return super().forward(x) * self.factor
        except AttributeError:
            return super().forward(x)


class HasSlots(Plain):
    def __init__(self):
        super().__init__(expert=InSlot)
        for e, expert in enumerate(self.experts):
            expert.factor = 1.0 + e


class Recorded(SwiGLU):
    """A buffer that requires a gradient."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(D, requires_grad=True))

    def forward(self, x):
        return super().forward(x) * (2 if self.factor.requires_grad else 1) * self.factor


class RecordsBuffer(Plain):
    def __init__(self):
        super().__init__(expert=Recorded)


def with_changed(change, block=Plain):
    def make():
        module = block()
        change(module.experts)
        return module

    return make


def tie(experts):
    experts[2].w1.weight = experts[1].w1.weight


def tie_to_first(experts):
    experts[0].w1.weight = experts[0].w3.weight


def hook(experts):
    experts[2].register_forward_hook(lambda _module, _args, out: 2 * out)


def other_activation(experts):
    experts[2].act_fn = nn.GELU()


def number_each(experts):
    for e, expert in enumerate(experts):
        expert.factor = float(e)


def reorder(experts):
    """The first by its number comes last in a loop over the list."""
    experts._modules["0"] = experts._modules.pop("0")


def freeze_one(experts):
    experts[2].requires_grad_(False)


class UsesFactor(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * self.experts[e].factor


def give_gradient(experts):
    experts[1].w1.weight.grad = torch.ones_like(experts[1].w1.weight)


CASES = {
    **{
        block.__name__: block
        for block in (
            *(CountsCalls, CountsInBuffer, WritesParameter, Penalised, KeepsLast),
            *(AsksExpert, SharesConfig, HasSlots, RecordsBuffer),
        )
    },
    "AsksForGradient": with_changed(give_gradient, AsksForGradient),
    "UsesFactor": with_changed(number_each, UsesFactor),
    **{
        change.__name__: with_changed(change)
        for change in (tie, tie_to_first, hook, other_activation, freeze_one, reorder)
    },
}
