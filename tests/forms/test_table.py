"""Each form has its file, goldens, programs that are compared in fp32 and bf16, and near misses left for a named rule.

Equality, the second length without a recompile and the form are tested in tests/backend/test_zoo.py and
test_zoo_bf16.py, the rules' names in tests/near_misses; here, that nothing is missing from them.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from fx_passes.forms import FORMS
from tests.backend import test_zoo, test_zoo_bf16
from tests.forms.table import TABLE
from tests.near_misses import NEAR_MISSES
from tests.zoo import ZOO

GOLDENS = Path(__file__).parent / "goldens"
LEFT = ("fixed_capacity",)
"""Recognised to say why they are left."""


def test_every_form_has_a_file_and_a_row():
    assert [Path(str(form.__file__)).stem for form in FORMS] == [form.NAME for form in FORMS]
    assert list(TABLE) == [form.NAME for form in FORMS]


def test_every_program_of_the_zoo_has_one_form():
    listed = Counter(name for row in TABLE.values() for name in row.programs)
    assert listed == Counter(case.name for case in ZOO if case.must_rewrite)


@pytest.mark.parametrize("form", TABLE)
def test_form_has_goldens_of_its_programs(form):
    files = GOLDENS.glob(f"test_{form}*.py")
    pinned = {name for file in files for name in re.findall(r'self\.golden\("(\w+)"\)', file.read_text())}
    assert bool(pinned) == (form not in LEFT)
    assert pinned <= set(TABLE[form].programs) | {case.name for case in ZOO if not case.must_rewrite}


@pytest.mark.parametrize("form", [form for form in TABLE if form not in LEFT])
def test_programs_are_compared_in_both_precisions(form):
    programs = set(TABLE[form].programs)
    assert programs <= {case.name for case in test_zoo.MUST}
    assert programs & test_zoo.QUICK
    assert programs & {case.name for case in test_zoo_bf16.CASES}


@pytest.mark.parametrize("form", TABLE)
def test_near_misses_are_left_for_a_named_rule(form):
    known = {miss.name: miss for miss in NEAR_MISSES}
    misses = [known[name] for name in TABLE[form].near_misses]
    assert len(set(misses)) >= 3
    assert all(miss.rule not in (None, "loop_has_a_known_form") and not miss.may_rewrite for miss in misses)
