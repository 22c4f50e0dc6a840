"""Compiling with the backend leaves nothing behind: other compilers, export, copies and files see the original."""

import copy
import io
import pickle

import pytest
import torch

from tests.backend.harness import (
    assert_same,
    compile_ours,
    fresh_dynamo,
    graphs,
    observe,
    python_state,
    rewritten,
)
from tests.zoo import hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.stacked import StackedBlock

CASES = (Case("range", RangeLoop), Case("hit", HitLoop), Case("stacked", StackedBlock))
OURS = "scatter_moe"

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def compiled_once(case):
    """A block which ran once under the backend, rewritten."""
    module = case.make()
    compiled = compile_ours(module)
    observe(compiled, module, hidden_states())
    assert rewritten() == 1
    module.zero_grad(set_to_none=True)
    return module, compiled


def ops_of_ours(graph_modules):
    return [node for gm in graph_modules for node in gm.graph.nodes if OURS in str(node.target)]


@each_case
def test_module_is_as_it_was(case):
    untouched, (module, _) = case.make(), compiled_once(case)
    assert python_state(module) == python_state(untouched)
    assert list(module.state_dict()) == list(untouched.state_dict())
    for name, method in vars(type(untouched)).items():
        assert vars(type(module))[name] is method


@each_case
def test_eager_runs_the_original(case):
    eager, (module, _) = case.make(), compiled_once(case)
    assert_same(observe(module, module, hidden_states()), observe(eager, eager, hidden_states()))


@each_case
def test_stock_compile_sees_the_original(case):
    module, _ = compiled_once(case)
    before = len(graphs)
    stock = torch.compile(module, backend="counting_eager")
    eager = case.make()
    assert_same(observe(stock, module, hidden_states()), observe(eager, eager, hidden_states()))
    assert not ops_of_ours(graphs[before:])


@each_case
def test_stock_compile_breaks_where_it_always_did(case):
    """Graphs of stock torch.compile, with and without our compile before."""

    def stock_graphs(module):
        torch._dynamo.reset()
        before = len(graphs)
        torch.compile(module, backend="counting_eager")(hidden_states())
        return [[node.op for node in gm.graph.nodes] for gm in graphs[before:]]

    expected = stock_graphs(case.make())
    fresh_dynamo()
    module, _ = compiled_once(case)
    assert stock_graphs(module) == expected


@each_case
@pytest.mark.parametrize("strict", [True, False])
def test_export_sees_the_original(case, strict):
    def export(module):
        try:
            program = torch.export.export(module, (hidden_states(requires_grad=False),), strict=strict)
        except Exception as error:  # noqa: BLE001  whatever export says, it must say the same
            return type(error)
        return [str(node.target) for node in program.graph.nodes]

    expected = export(case.make())
    module, _ = compiled_once(case)
    assert export(module) == expected


@each_case
def test_copies_are_plain_and_rewritten_again(case):
    eager, (module, _) = case.make(), compiled_once(case)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert python_state(twin) == python_state(eager)
        assert_same(observe(twin, twin, hidden_states()), observe(eager, eager, hidden_states()))
        fresh_dynamo()
        again = compile_ours(twin)
        assert_same(observe(again, twin, hidden_states()), observe(eager, eager, hidden_states()))
        assert rewritten() == 1


@each_case
def test_saved_module_loads(case):
    eager, (module, _) = case.make(), compiled_once(case)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(observe(loaded, loaded, hidden_states()), observe(eager, eager, hidden_states()))


@each_case
def test_moves_and_loads_keep_the_compiled_module_right(case):
    eager, (module, compiled) = case.make(), compiled_once(case)
    other = case.make(seed=1).state_dict()
    for target in (eager, module):
        target.load_state_dict(other, assign=True)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))
    for target in (eager, module):
        target.to(torch.float64)
    x = hidden_states(dtype=torch.float64)
    assert_same(observe(compiled, module, x), observe(eager, eager, x))


@each_case
def test_optimizer_step_between_calls_is_seen(case):
    eager, (module, compiled) = case.make(), compiled_once(case)
    for target, call in ((eager, eager), (module, compiled)):
        optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
        for seed in range(2):
            observe(call, target, hidden_states(seed=seed))
            optimizer.step()
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))


def test_dynamo_settings_are_as_they_were():
    """Flags that the capture needs are set for its frames alone."""
    before = torch._dynamo.config.get_config_copy()
    compiled_once(CASES[0])
    fresh_dynamo()
    compiled_once(CASES[1])
    assert torch._dynamo.config.get_config_copy() == before


@each_case
def test_ways_to_hold_a_model(case):
    """A function of the model, a closure, model.compile() and a compiled submodule are rewritten alike."""
    eager = case.make()
    expected = observe(eager, eager, hidden_states())

    def by_argument(module):
        run = compile_ours(lambda block, x: block(x))
        return lambda x: run(module, x)

    def by_closure(module):
        return compile_ours(lambda x: module(x))

    def in_place(module):
        module.compile(backend="scatter_moe", options={"inner_backend": "counting_aot_eager"})
        return module

    for hold in (by_argument, by_closure, in_place):
        fresh_dynamo()
        module = case.make()
        actual = observe(hold(module), module, hidden_states())
        assert rewritten() == 1, hold.__name__
        actual.state = expected.state
        assert_same(actual, expected)
