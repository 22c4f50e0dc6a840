"""Every block of the zoo under the backend: found, one graph, any length, and equal to eager forward and backward."""

import copy

import pytest
import torch

import scatter_moe
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.zoo import ZOO, hidden_states

MUST = [case for case in ZOO if case.must_rewrite]
MAY = [case for case in ZOO if not case.must_rewrite]
WITH_INDUCTOR = ("mixtral_445", "stacked_sentinel", "gpt_oss_5", "range_lora")


def any_length(tokens, seed=0):
    x = hidden_states(tokens, seed=seed)
    torch._dynamo.mark_dynamic(x, 1)
    return x


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.mark.parametrize("case", MUST, ids=lambda case: case.name)
def test_block_is_rewritten_and_equal(case):
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, fullgraph=True)
    for seed, tokens in enumerate((24, 32, 4)):
        actual = observe(compiled, module, any_length(tokens, seed), seed=seed)
        assert_same(actual, observe(eager, eager, any_length(tokens, seed), seed=seed))
    assert rewritten() == 1
    assert len(graphs) == 1


@pytest.mark.parametrize("case", MUST, ids=lambda case: case.name)
def test_explain_describes_the_region(case):
    report = scatter_moe.explain(case.make(), hidden_states())
    assert len(report.regions) == 1
    region = report.regions[0]
    assert (region.num_experts, region.top_k) == (case.num_experts, case.top_k)
    if case.op is not None:
        assert region.op == case.op
    if case.op == "mlp":
        assert region.activation == case.activation
    assert "zoo" in region.source


@pytest.mark.parametrize("case", MAY, ids=lambda case: case.name)
def test_block_is_equal_whether_rewritten_or_not(case):
    eager, module = case.make(), case.make()
    compiled = compile_ours(module)
    for seed, tokens in enumerate((24, 32)):
        actual = observe(compiled, module, hidden_states(tokens, seed), seed=seed)
        assert_same(actual, observe(eager, eager, hidden_states(tokens, seed), seed=seed))


@pytest.mark.parametrize("case", [case for case in MUST if case.name in WITH_INDUCTOR], ids=lambda case: case.name)
def test_block_through_inductor(case):
    eager, module = case.make(), case.make()
    compiled = compile_ours(module, inner="inductor", fullgraph=True)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1


@pytest.mark.parametrize("case", [case for case in MUST if not case.random], ids=lambda case: case.name)
def test_block_without_gradients(case):
    eager, module = case.make().eval(), case.make().eval()
    compiled = compile_ours(module, inner="counting_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        x = hidden_states(requires_grad=False)
        with mode():
            assert_same(observe(compiled, module, x, backward=False), observe(eager, eager, x, backward=False))
    assert rewritten() == len(graphs)


@pytest.mark.parametrize("name", ["mixtral_445", "stacked_sentinel", "deepseek_v3_457"])
def test_frozen_parameters_get_no_gradient(name):
    case = next(case for case in ZOO if case.name == name)
    eager, module = case.make(), case.make()
    for block in (eager, module):
        for index, parameter in enumerate(block.parameters()):
            parameter.requires_grad_(index % 2 == 0)
    compiled = compile_ours(module, fullgraph=True)
    actual, expected = observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states())
    assert_same(actual, expected)
    assert all(module.get_parameter(n).requires_grad or actual.grads[n] is None for n, _ in module.named_parameters())
    assert rewritten() == 1


def test_copies_share_nothing():
    case = ZOO[0]
    module = case.make()
    compile_ours(module)(hidden_states())
    twin = copy.deepcopy(module)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
