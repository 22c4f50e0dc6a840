"""Near misses compiled with the backend: equal to eager in all that a user sees, not rewritten, and told why."""

import re

import pytest

from fx_passes.report import collecting
from scatter_moe.explain import Explanation
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.near_misses import NEAR_MISSES
from tests.zoo import hidden_states


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.name)
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


INTERNAL = re.compile(r"0x[0-9a-f]{6,}|\d{9,}|Variable \d|sym_size|`[lL]_")
"""Addresses, identities, classes, operators and names that are Dynamo's own: no user can tell what they are."""


def assert_explained(miss, explanation):
    assert not explanation.regions
    assert not INTERNAL.search("".join(rejection.detail for rejection in explanation.rejections))
    rules = {rejection.rule for rejection in explanation.rejections}
    if miss.rule is None:
        assert not rules
        return
    assert miss.rule in rules
    assert f"{miss.rule}: " in str(explanation)
    assert any("near_misses" in rejection.source or "zoo" in rejection.source for rejection in explanation.rejections)
