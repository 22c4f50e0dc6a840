"""No rewrite changes outputs, gradients, buffers, Python state or the random numbers drawn.

SCATTER_MOE_PROGRAMS (40) says how many programs are drawn, SCATTER_MOE_SEED (0) which. `python -m tests.adversarial`
runs thousands.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, note, seed, settings

from tests.adversarial.check import FAILED, LEFT_ALONE, NOT_RUNNING, PROGRAMS, REWRITTEN, check, draw
from tests.adversarial.conftest import SEED, TALLY
from tests.adversarial.programs import LOOPS, Program, additions_of

LEFT_AS_THEY_ARE = {"rounds", "rounds_of_hits", "rows_of_all"}  # an expert's rows are added several times
COUNT = int(os.environ.get("SCATTER_MOE_PROGRAMS", "40"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def tally(request):
    """How many programs ran, and what became of them; printed at the end of the run."""
    return request.config.stash.setdefault(TALLY, Counter())


@seed(SEED)
@settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(program=PROGRAMS)
def test_rewritten_programs_stay_what_they_were(program, directory, tally):
    note(program.source())
    verdict = check(program, directory)
    tally[verdict.outcome] += 1
    assume(verdict.outcome != NOT_RUNNING)
    assert verdict.outcome != FAILED, verdict.detail


@pytest.mark.parametrize(
    ("loop", "addition"),
    [(loop, addition) for loop in sorted(LOOPS.keys() - LEFT_AS_THEY_ARE) for addition in additions_of(loop)],
)
def test_every_loop_is_rewritten_before_it_is_mutated(loop, addition, directory):
    """Else mutations of it prove nothing."""
    router = "top_1" if addition == "assigned" else "softmax"
    assert check(Program(router, loop, "modules", addition, ()), directory).outcome == REWRITTEN


def test_some_programs_were_rewritten(tally):
    assert tally[REWRITTEN] > 0
    assert tally[LEFT_ALONE] > 0


def test_a_seed_draws_the_same_programs():
    programs = draw(50, 1)
    assert programs == draw(50, 1) != draw(50, 2)
    assert len(set(programs)) == 50
