"""Loops over all experts that are traced as one iteration, and those where one expert does not stand for all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fx_passes.capture import Capture
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.near_misses.common import Loop, hits
from tests.zoo import hidden_states
from tests.zoo.case import Case
from tests.zoo.common import D, E, SwiGLU
from tests.zoo.stacked import StackedBlock, StackedRange

unrolled: list[object] = []
FACTORS: dict[nn.Module, float] = {}


@pytest.fixture(autouse=True)
def _watch_restarts(monkeypatch):
    fresh_dynamo()
    unrolled.clear()
    original = Capture.trace_again_unrolled

    def trace_again_unrolled(self, loops):
        unrolled.append(loops)
        original(self, loops)

    monkeypatch.setattr(Capture, "trace_again_unrolled", trace_again_unrolled)


class Plain(Loop):
    """A range loop whose iteration a subclass writes, as (tokens, value)."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.run(e, x[tokens]) * weights[tokens, slots, None])
        return out

    def run(self, e, rows):
        return self.experts[e](rows)


class Iterated(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        e = 0
        for _, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
            e += 1  # noqa: SIM113  as it is written
        return out


class Enumerated(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += expert(x[tokens]) * weights[tokens, slots, None]
        return out


class Zipped(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for chosen, expert in zip(mask, self.experts):  # noqa: B905  as it is written
            slots, tokens = torch.where(chosen)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class Hits(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class Guarded(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens) == 0:
                continue
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class StackedRangeBlock(StackedBlock):
    def __init__(self):
        super().__init__()
        self.experts = StackedRange()


@pytest.mark.parametrize("block", [Plain, Enumerated, Zipped, Hits, Guarded, StackedRangeBlock])
def test_experts_that_are_alike_are_traced_once(block):
    case = Case(block.__name__, block)
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, fullgraph=True)
    for seed, tokens in enumerate((24, 32)):
        x = hidden_states(tokens, seed)
        torch._dynamo.mark_dynamic(x, 1)
        assert_same(
            observe(compiled, module, x, seed=seed), observe(eager, eager, hidden_states(tokens, seed), seed=seed)
        )
    assert (rewritten(), len(graphs), unrolled) == (1, 1, [])


class BranchesOnNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) if e != 3 else rows


class LooksNumberUp(Plain):
    def run(self, e, rows):
        return rows if e in {1, 3} else self.experts[e](rows)


class ScalesByNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (e + 1)


class NamesAttribute(Plain):
    """An attribute that only one expert has a name for."""

    def __init__(self):
        super().__init__()
        self.scale_2 = 3.0

    def run(self, e, rows):
        return self.experts[e](rows) * getattr(self, f"scale_{e}", 1.0)


class LooksInDict(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * {2: 3.0}.get(e, 1.0)


class FormatsNumber(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (2.0 if str(e) == "2" else 1.0)


class ComparesIdentity(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert is self.experts[1] else 1.0)


class SearchesModule(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert in [self.experts[1]] else 1.0)


class ComparesParameter(Plain):
    def run(self, e, rows):
        expert = self.experts[e]
        return expert(rows) * (2.0 if expert.w1.weight is self.experts[1].w1.weight else 1.0)


class AsksForId(Plain):
    def run(self, e, rows):
        return self.experts[e](rows) * (2.0 if id(self.experts[e]) == id(self.experts[1]) else 1.0)


class NeedsFirst(Plain):
    """Every expert adds what the first one makes of its rows."""

    def run(self, e, rows):
        return self.experts[e](rows) + self.experts[0](rows)


class AppendsNumber(Plain):
    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, e, rows):
        self.seen.append(e)
        return self.experts[e](rows)


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


class AsksForConstant(Plain):
    """What is asked of an expert while it is traced is asked of one expert."""

    def __init__(self):
        super().__init__()
        FACTORS.update({expert: 1.0 + e for e, expert in enumerate(self.experts)})

    def run(self, e, rows):
        return self.experts[e](rows) * factor_of(self.experts[e])


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
            *(BranchesOnNumber, LooksNumberUp, ScalesByNumber, NamesAttribute, LooksInDict, FormatsNumber),
            *(ComparesIdentity, SearchesModule, ComparesParameter, AsksForId, AppendsNumber),
            *(CountsCalls, CountsInBuffer, WritesParameter, Penalised, KeepsLast, Iterated),
            *(AsksForConstant, SharesConfig, HasSlots, RecordsBuffer),
        )
    },
    "AsksForGradient": with_changed(give_gradient, AsksForGradient),
    "UsesFactor": with_changed(number_each, UsesFactor),
    **{
        change.__name__: with_changed(change)
        for change in (tie, tie_to_first, hook, other_activation, freeze_one, reorder)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_where_experts_can_be_told_apart(name):
    """As in eager, whether the loop is rewritten when its experts are traced one by one or not."""
    case = Case(name, CASES[name])
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, inner="counting_eager")
    x = hidden_states()
    keep = name == "AsksForGradient"
    call = observe_keeping_gradients if keep else observe
    assert_same(call(compiled, module, x), call(eager, eager, x))


def observe_keeping_gradients(call, module, x):
    module.zero_grad = lambda set_to_none=True: None
    seen = observe(call, module, x, backward=False)
    del module.zero_grad
    return seen


def test_the_first_expert_by_its_number_is_not_the_one_that_stands_for_all():
    case = Case("needs_first", NeedsFirst)
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    x = hidden_states()
    assert_same(observe(compiled, module, x), observe(eager, eager, x))


def other_method(expert):
    expert.forward = lambda x: 2 * type(expert).forward(expert, x)


def other_submodule(expert):
    expert.act_fn = nn.Tanh()


def hook_on_linear(expert):
    expert.w2.register_forward_hook(lambda _module, _args, out: out + 1)


def hook_on_expert(expert):
    expert.register_forward_hook(lambda _module, _args, out: 2 * out)


def with_bias(expert):
    expert.w3.bias = nn.Parameter(torch.ones(expert.w3.weight.shape[0]))


@pytest.mark.parametrize(
    ("block", "change"),
    [
        (Plain, other_method),
        (Plain, other_submodule),
        (Plain, hook_on_linear),
        (Plain, with_bias),
        (Hits, hook_on_expert),
    ],
)
def test_a_change_in_any_expert_is_noticed(block, change):
    """The guards on the one that was traced are guards on each."""
    for expert in (0, E - 1):
        fresh_dynamo()
        case = Case(block.__name__, block)
        eager, module = case.make(), case.make()
        compiled = compile_ours(module, inner="counting_eager")
        x = hidden_states(requires_grad=False)
        with torch.no_grad():
            assert_same(observe(compiled, module, x, backward=False), observe(eager, eager, x, backward=False))
            assert unrolled == []
            for changed in (eager, module):
                change(changed.experts[expert])
            assert_same(observe(compiled, module, x, backward=False), observe(eager, eager, x, backward=False))
        unrolled.clear()


def test_forward_of_a_functional_call_of_an_expert_is_not_taken_for_it():
    """F.linear on the experts' weights, without their forward."""

    class Functional(Plain):
        def run(self, e, rows):
            expert = self.experts[e]
            gate, up = F.linear(rows, expert.w1.weight), F.linear(rows, expert.w3.weight)
            return F.linear(F.silu(gate) * up, expert.w2.weight)

    case = Case("functional", Functional)
    eager, module = case.make(), case.make()
    x = hidden_states()
    assert_same(observe(compile_ours(module), module, x), observe(eager, eager, x))
    assert (rewritten(), unrolled) == (1, [])
