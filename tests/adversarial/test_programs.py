"""No rewrite changes outputs, gradients, buffers, Python state or the random numbers drawn.

SCATTER_MOE_PROGRAMS (40) says how many programs are drawn, SCATTER_MOE_SEED (0) which.
"""

import importlib.util
import itertools
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, seed, settings
from hypothesis import strategies as st

from tests.adversarial.conftest import SEED, TALLY
from tests.adversarial.model import D
from tests.adversarial.programs import ADDITIONS, BODIES, LOOPS, MUTATIONS, ROUTERS, Program
from tests.backend.harness import assert_equal_value, assert_same, compile_ours, fresh_dynamo, observe, rewritten

COUNT = int(os.environ.get("SCATTER_MOE_PROGRAMS", "40"))

PROGRAMS = st.builds(
    Program,
    *(st.sampled_from(sorted(table)) for table in (ROUTERS, LOOPS, BODIES, ADDITIONS)),
    st.lists(st.sampled_from(sorted(MUTATIONS)), max_size=2, unique=True).map(tuple),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def tally(request):
    """How many programs ran, and what became of them; printed at the end of the run."""
    return request.config.stash.setdefault(TALLY, Counter())


_numbers = itertools.count()


def load(source, directory):
    path = directory / f"program_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Program


def run(program, compiled):
    """What two steps of a program show, and the random number that is drawn next."""
    torch.manual_seed(0)
    module = program()
    call = compiled(module)
    seen = []
    for step, tokens in enumerate((7, 4)):
        x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(step)).requires_grad_()
        seen.append((observe(call, module, x, seed=step), torch.rand(())))
    return seen


def assert_all_same(ours, eager):
    for (our_sight, our_number), (sight, number) in zip(ours, eager, strict=True):
        assert_same(our_sight, sight)
        assert_equal_value(our_number, number, "the next random number")


def is_stocks_fault(program, eager):
    """Whether torch.compile without us differs from eager, too."""
    fresh_dynamo()
    try:
        assert_all_same(run(program, lambda module: torch.compile(module, backend="eager")), eager)
    except Exception:  # noqa: BLE001  (whatever it is, it isn't ours)
        return True
    return False


@seed(SEED)
@settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(program=PROGRAMS)
def test_rewritten_programs_stay_what_they_were(program, directory, tally):
    source = program.source()
    note(source)
    made = load(source, directory)
    try:
        eager = run(made, lambda module: module)
    except Exception:  # noqa: BLE001  (a mutation may make a program that doesn't run)
        tally["that fail in eager"] += 1
        assume(False)
    fresh_dynamo()
    try:
        assert_all_same(run(made, lambda module: compile_ours(module, inner="counting_eager")), eager)
    except Exception:
        if not is_stocks_fault(made, eager):
            raise
        tally["that PyTorch alone compiles wrongly"] += 1
        return
    tally["rewritten" if rewritten() else "left alone"] += 1


def test_some_programs_were_rewritten(tally):
    assert tally["rewritten"] > 0
    assert tally["left alone"] > 0
