"""Loops over all experts that are traced as one iteration, and those where one expert does not stand for all."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.nn import functional as F

from fx_passes.capture import Capture
from tests.backend import told_apart_by_contents, told_apart_by_number
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.backend.told_apart_by_number import Plain
from tests.near_misses.common import Loop, hits
from tests.zoo import hidden_states
from tests.zoo.case import Case
from tests.zoo.common import E
from tests.zoo.stacked import StackedBlock, StackedRange

unrolled: list[object] = []
TOLD_APART = {**told_apart_by_number.CASES, **told_apart_by_contents.CASES}


@pytest.fixture(autouse=True)
def _watch_restarts(monkeypatch):
    fresh_dynamo()
    unrolled.clear()
    original = Capture.trace_again_unrolled

    def trace_again_unrolled(self, loops):
        unrolled.append(loops)
        original(self, loops)

    monkeypatch.setattr(Capture, "trace_again_unrolled", trace_again_unrolled)


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


class Casts(Plain):
    """The router says again what its classifier is to be, and so writes an attribute before the loop."""

    def begin(self, hidden_states):
        self.gate = self.gate.to(torch.float32)
        return super().begin(hidden_states)


class StackedRangeBlock(StackedBlock):
    def __init__(self):
        super().__init__()
        self.experts = StackedRange()


@pytest.mark.parametrize("block", [Plain, Enumerated, Zipped, Hits, Guarded, Casts, StackedRangeBlock])
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


class NeedsFirst(Plain):
    """Every expert adds what the first one makes of its rows."""

    def run(self, e, rows):
        return self.experts[e](rows) + self.experts[0](rows)


@pytest.mark.parametrize("name", TOLD_APART)
def test_where_experts_can_be_told_apart(name):
    """As in eager, whether the loop is rewritten when its experts are traced one by one or not."""
    case = Case(name, TOLD_APART[name])
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, inner="counting_eager")
    x = hidden_states()
    keep = name == "AsksForGradient"
    call = observe_keeping_gradients if keep else observe
    assert_same(call(compiled, module, x), call(eager, eager, x))


def test_where_a_function_is_asked_about_an_expert():
    """As stock: PyTorch 2.11 takes no module as an argument of a function whose result is assumed constant."""
    case = Case("asks_about_expert", told_apart_by_contents.AsksAboutExpert)
    eager, stock, module = case.make(), case.make(), case.make()
    x = hidden_states()
    try:
        torch.compile(stock, backend="eager")(x)
    except InternalTorchDynamoError:
        with pytest.raises(InternalTorchDynamoError, match="is not a constant"):
            compile_ours(module, inner="counting_eager")(x)
    else:
        compiled = compile_ours(module, inner="counting_eager")
        assert_same(observe(compiled, module, x), observe(eager, eager, x))


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


@pytest.mark.parametrize("called", [torch.no_grad, torch.inference_mode])
def test_a_model_made_in_inference_mode(called):
    with torch.inference_mode():
        eager, module = Case("enumerated", Enumerated).make(), Case("enumerated", Enumerated).make()
    x = hidden_states(requires_grad=False)
    with called():
        torch.testing.assert_close(compile_ours(module)(x), eager(x))
    assert (rewritten(), unrolled) == (1, [])


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
