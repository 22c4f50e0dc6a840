"""Inductor's pre_grad_custom_pass as a second door: what Dynamo traces alone is rewritten, cached by our sources."""

import functools

import pytest
import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache

import scatter_moe
from fx_passes import cache_key, faults, pipeline
from tests.backend.harness import assert_close, assert_same, counters, fresh_dynamo, observe, rewritten
from tests.near_misses import NEAR_MISSES
from tests.zoo import ZOO, hidden_states
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case

TRACED_ALONE = [case for case in ZOO if case.name in ("gathered_einsum", "dense_einsum", "stack_gather")]
LOOP = Case("range", RangeLoop)
MISSES = [miss for miss in NEAR_MISSES if miss.name in ("range_no_grad_on_one", "range_aliases_input")]

# Inductor up to the code that it would generate.
inductor_without_code = functools.partial(
    compile_fx, inner_compile=lambda gm, *_args, **_kwargs: make_boxed_func(gm.forward)
)


@pytest.fixture(autouse=True)
def _second_door():
    """The pass is in place, and nothing is cached: on a hit it need not run."""
    fresh_dynamo()
    with fresh_cache(), inductor_config.patch(pre_grad_custom_pass=scatter_moe.pre_grad_pass):
        yield


def check(case, backend):
    eager, module = case.make(), case.make()
    compiled = torch.compile(module, backend=backend)
    assert_same(observe(compiled, module, hidden_states()), observe(eager, eager, hidden_states()))


@pytest.mark.parametrize("case", TRACED_ALONE, ids=lambda case: case.name)
def test_graphs_of_stock_dynamo_are_rewritten(case):
    check(case, inductor_without_code)
    assert rewritten() == 1


@pytest.mark.parametrize("flag", [True, False])
def test_loop_is_rewritten_where_stock_dynamo_traces_it(flag):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=flag):
        check(LOOP, inductor_without_code)
    assert rewritten() == flag


@pytest.mark.parametrize("way_in", ["backend", "prepare"])
def test_what_came_in_by_another_door_is_rewritten_once(way_in):
    """A second look at the graph would find that nothing is left of the loop that was captured."""
    case = Case("hit", HitLoop)
    eager, module = case.make(), case.make()
    ours = way_in == "backend"
    compiled = torch.compile(
        module if ours else scatter_moe.prepare(module),
        backend="scatter_moe" if ours else inductor_without_code,
        fullgraph=True,
    )
    with torch.no_grad():
        assert_close(compiled(hidden_states()), eager(hidden_states()), "output")
    assert rewritten() == 1


def test_after_a_fault_the_graph_is_what_it_was(monkeypatch):
    def run(gm):
        gm.graph.erase_node(next(node for node in reversed(gm.graph.nodes) if node.op == "output"))
        raise ZeroDivisionError

    monkeypatch.delenv(faults.RAISE_FAULTS)
    monkeypatch.setattr(pipeline, "run", run)
    check(TRACED_ALONE[0], inductor_without_code)
    assert rewritten() == 0


@pytest.mark.parametrize("miss", MISSES, ids=lambda miss: miss.name)
def test_near_misses_are_left_alone(miss):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(miss, inductor_without_code)
    assert rewritten() == 0


@pytest.mark.slow
def test_inductor_caches_by_our_sources(monkeypatch):
    """The second compile finds the first one's code; with other sources of ours it doesn't."""
    check(TRACED_ALONE[0], "inductor")
    fresh_dynamo()
    check(TRACED_ALONE[0], "inductor")
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    fresh_dynamo()
    monkeypatch.setattr("fx_passes.entry.pre_grad.sources_hash", lambda: "other sources")
    check(TRACED_ALONE[0], "inductor")
    assert counters["aot_autograd"]["autograd_cache_hit"] == 0


def test_pass_is_identified_by_our_sources():
    assert scatter_moe.pre_grad_pass.uuid() == cache_key.sources_hash()
