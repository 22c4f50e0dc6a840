"""`prepare(model)`: every Dynamo backend and strict export rewrite it; eager, copies and files know nothing of it."""

import copy

import pytest
import torch
from torch import nn

import scatter_moe
from tests.backend.harness import assert_same, fresh_dynamo, graphs, observe, python_state, rewritten
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.stacked import StackedBlock

CASES = (Case("range", RangeLoop), Case("hit", HitLoop), Case("stacked", StackedBlock))

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@each_case
def test_another_backend_gets_the_rewritten_graph(case):
    eager, module = case.make(), scatter_moe.prepare(case.make())
    compiled = torch.compile(module, backend="counting_aot_eager", fullgraph=True)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert rewritten() == 1
    assert len(graphs) == 1


@each_case
def test_without_fullgraph_and_in_a_function(case):
    eager, module = case.make(), scatter_moe.prepare(case.make())
    compiled = torch.compile(lambda model, x: model(x), backend="counting_aot_eager")
    actual = observe(lambda x: compiled(module, x), module, hidden_states())
    assert_same(actual, observe(eager, eager, hidden_states()))
    assert rewritten() == 1


@each_case
def test_strict_export_holds_the_ops(case):
    module = scatter_moe.prepare(case.make())
    x = hidden_states(requires_grad=False)
    program = torch.export.export(module, (x,), strict=True)
    assert any("scatter_moe" in str(node.target) for node in program.graph.nodes)
    assert_same(observe(program.module(), nn.Module(), x), observe(module, nn.Module(), x))


@each_case
def test_nothing_is_left_on_the_model(case):
    untouched, module = case.make(), scatter_moe.prepare(case.make())
    torch.compile(module, backend="counting_aot_eager")(hidden_states())
    assert python_state(module) == python_state(untouched)
    fresh_dynamo()
    torch.compile(copy.deepcopy(module), backend="counting_aot_eager")(hidden_states())
    assert rewritten() == 0


def test_only_modules_are_prepared():
    with pytest.raises(TypeError, match="model"):
        scatter_moe.prepare(torch.relu)
