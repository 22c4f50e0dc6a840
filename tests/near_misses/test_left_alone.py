"""Near misses compiled with the backend: equal to eager in all that a user sees, not rewritten, and told why."""

import pytest

from fx_passes.report import collecting
from scatter_moe.explain import Explanation
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.forms.table import TABLE
from tests.near_misses import NEAR_MISSES
from tests.zoo import hidden_states

SHOWN = {name for row in TABLE.values() for name in row.near_misses}


def first_of_each_and_shown():
    """The first of each rule and style (range, hit, dense) and those of the table of forms; the others are slow."""
    seen, params = set(), []
    for miss in NEAR_MISSES:
        kind = (miss.rule, miss.name.split("_")[0])
        is_slow = kind in seen and miss.name not in SHOWN
        params.append(pytest.param(miss, id=miss.name, marks=[pytest.mark.slow] if is_slow else []))
        seen.add(kind)
    return params


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("miss", first_of_each_and_shown())
def test_near_miss_is_left_alone(miss):
    """Equal to eager on two inputs; one that must not be rewritten is not, and what `explain` prints has the rule."""
    eager, module = miss.make(), miss.make()
    compiled = compile_ours(module, inner="counting_eager")
    with collecting() as report:
        for seed in range(2):
            actual = observe(compiled, module, hidden_states(seed=seed), seed=seed)
            assert_same(actual, observe(eager, eager, hidden_states(seed=seed), seed=seed))
    if not miss.may_rewrite:
        assert rewritten() == 0
        assert_explained(miss, Explanation(report))


def assert_explained(miss, explanation):
    assert not explanation.regions
    rules = {rejection.rule for rejection in explanation.rejections}
    if miss.rule is None:
        assert not rules
        return
    assert miss.rule in rules
    assert f"{miss.rule}: " in str(explanation)
    assert any("near_misses" in rejection.source or "zoo" in rejection.source for rejection in explanation.rejections)
