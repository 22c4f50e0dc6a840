"""Dynamo notes the names of all parameters below each module that it meets: for exporters, and for nobody else."""

import torch

from tests.backend.harness import compile_ours, fresh_dynamo, graphs
from tests.zoo import hidden_states
from tests.zoo.bodies import RangeLoop


def names_noted(compile_with) -> set[str]:
    fresh_dynamo()
    compile_with(RangeLoop())(hidden_states())
    return set(graphs[0].meta["dynamo_flat_name_to_original_fqn"].values())


def test_frames_of_ours_do_without():
    assert names_noted(compile_ours) == set()


def test_frames_of_others_and_exporters_have_them():
    assert "gate.weight" in names_noted(lambda module: torch.compile(module, backend="counting_eager"))
    with torch._dynamo.config.patch(install_free_tensors=True):
        assert "gate.weight" in names_noted(compile_ours)
