"""What the report says of a rewritten loop: where it stood, and where it may differ from eager."""

import re

import pytest
import torch
from torch import nn

import scatter_moe
from fx_passes.report import GRADIENTS, RANGE
from tests.near_misses import NEAR_MISSES
from tests.zoo import ZOO, hidden_states

CASES = {case.name: case for case in ZOO}
EXPECTED = {
    "stacked_sentinel": (GRADIENTS, RANGE),  # a hit loop over one_hot
    "mixtral_457": (GRADIENTS, RANGE),  # a hit loop over modules: unrolled
    "mixtral_445": (RANGE,),  # range(E) over one_hot, every expert runs
    "any_guard": (GRADIENTS,),  # ids == e, skipped where no token is the expert's
    "sigmoid_top": (),  # ids == e, every expert runs
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EXPECTED)
def test_deviations_are_those_of_the_loop(name):
    explanation = scatter_moe.explain(CASES[name].make(), hidden_states())
    assert [region.deviations for region in explanation.regions] == [EXPECTED[name]]


def test_source_is_a_place_and_code_the_line_there():
    region = scatter_moe.explain(CASES["sigmoid_top"].make(), hidden_states()).regions[0]
    path, line = region.source.rsplit(":", 1)
    with open(path) as file:
        assert file.readlines()[int(line) - 1].strip() == region.code
    assert region.code.startswith("out.index_add_(")


@pytest.mark.parametrize("columns", [60, 200])
def test_table_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    explanation = scatter_moe.explain(CASES["sigmoid_top"].make(), hidden_states())
    header, row = str(explanation).splitlines()[1:3]
    assert len(row) <= columns
    assert row.endswith("...") == (columns == 60)
    if columns == 200:
        assert re.search(r" loops\.py:\d+ ", row)
        assert row.index("loops.py") == header.index("source")


def test_module_paths_are_those_of_named_modules():
    block = CASES["plus_equals"].make()
    for model, path in ((nn.Sequential(block), "0"), (nn.Sequential(nn.Sequential(block)), "0.0")):
        torch._dynamo.reset()
        (region,) = scatter_moe.explain(model, hidden_states()).regions
        assert region.module_path == path


def test_numbers_of_tokens_are_named_in_words():
    (miss,) = [miss for miss in NEAR_MISSES if miss.name == "counts_returned"]
    (rejection,) = scatter_moe.explain(miss.make(), hidden_states()).rejections
    assert rejection.detail.startswith("the number of an expert's tokens, as a Python number, is used outside")
