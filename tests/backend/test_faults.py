"""A fault of the package itself: the user's program runs as PyTorch alone compiles it, and the user is told."""

import logging

import pytest
import torch

import scatter_moe
from fx_passes import faults, pipeline
from fx_passes.capture import loops
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.zoo import ZOO, hidden_states

CASE = next(case for case in ZOO if case.name == "stacked_sentinel")


class Bug(Exception):
    pass


@pytest.fixture(params=["capture", "pass"])
def fault(request, monkeypatch):
    """A bug while tracing, or in the pass after it has changed the graph."""
    fresh_dynamo()
    faults._told.clear()
    if request.param == "capture":
        monkeypatch.setattr(loops, "fact", _raise)
    else:
        monkeypatch.setattr(pipeline, "rewrite", _erase_and_raise)


@pytest.fixture
def warnings():
    """What the logger says."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    faults.log.addHandler(handler)
    yield records
    faults.log.removeHandler(handler)


def _raise(_node):
    raise Bug("seeded")


def _erase_and_raise(region):
    region.graph.erase_node(region.result)
    raise Bug("seeded")


@pytest.mark.usefixtures("fault")
def test_frame_is_left_alone_and_the_user_is_told_once(monkeypatch, warnings):
    monkeypatch.delenv(faults.RAISE_FAULTS)
    eager, module = CASE.make(), CASE.make()
    compiled = compile_ours(module, inner="counting_eager")
    for seed, dtype in enumerate((torch.float32, torch.float64)):  # the second is compiled anew
        eager, module = eager.to(dtype), module.to(dtype)
        x, y = (hidden_states(seed=seed).detach().to(dtype).requires_grad_() for _ in range(2))
        assert_same(observe(compiled, module, x, seed=seed), observe(eager, eager, y, seed=seed))
    assert rewritten() == 0
    (warning,) = warnings
    assert warning.exc_info is not None and warning.exc_info[0] is Bug


@pytest.mark.usefixtures("fault")
def test_explain_tells_of_it(monkeypatch):
    monkeypatch.delenv(faults.RAISE_FAULTS)
    report = scatter_moe.explain(CASE.make(), hidden_states())
    assert not report.regions
    assert ("scatter_moe_has_no_fault", "Bug: seeded") in {(r.rule, r.detail) for r in report.rejections}


@pytest.mark.usefixtures("fault")
def test_tests_fail_by_it():
    with pytest.raises(Exception, match="seeded"):
        compile_ours(CASE.make(), inner="counting_eager")(hidden_states())
