"""Near misses compiled with the backend: equal to eager in all that a user sees, not rewritten, and told why."""

import pytest
import torch

import scatter_moe
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.near_misses import NEAR_MISSES
from tests.zoo import hidden_states

FORBIDDEN = [miss for miss in NEAR_MISSES if not miss.may_rewrite]


def one_of_each(misses):
    """The first of each rule and style (range, hit, dense) always runs; the others are slow."""
    seen, params = set(), []
    for miss in misses:
        kind = (miss.rule, miss.name.split("_")[0])
        params.append(pytest.param(miss, id=miss.name, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return params


pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.mark.parametrize("miss", one_of_each(NEAR_MISSES))
def test_near_miss_is_equal_to_eager(miss):
    eager, module = miss.make(), miss.make()
    compiled = compile_ours(module, inner="counting_eager")
    for seed in range(2):
        x = hidden_states(seed=seed)
        actual = observe(compiled, module, x, seed=seed)
        assert_same(actual, observe(eager, eager, x, seed=seed))
    if not miss.may_rewrite:
        assert rewritten() == 0


@pytest.mark.parametrize("miss", one_of_each(FORBIDDEN))
def test_explain_names_the_rule(miss):
    torch.manual_seed(0)
    report = scatter_moe.explain(miss.make(), hidden_states())
    assert not report.regions
    if miss.rule is None:
        assert not report.rejections
        return
    assert miss.rule in {rejection.rule for rejection in report.rejections}
    assert any("near_misses" in rejection.source or "zoo" in rejection.source for rejection in report.rejections)
