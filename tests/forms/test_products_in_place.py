"""Which products of sorted rows read and write them in place; that all compute the same is shown with the zoo."""

import pytest
import torch

from tests.backend.harness import compile_ours, fresh_dynamo, graphs
from tests.zoo import ZOO, hidden_states

BOTH, READ, WRITTEN, NEITHER = (2, False, False), (2, False, True), (1, True, False), (1, True, True)
BY_SLOT = (1, False, True)  # the second product of all of them
LAYOUTS = {
    "segments_projections": BOTH,
    "segments_projections_written": WRITTEN,
    "segments_projections_detached": NEITHER,
    "segments_projections_elsewhere": NEITHER,
    "segments_projections_read_twice": NEITHER,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    """top_k, grouped_in and grouped_out of each product."""
    fresh_dynamo()
    (case,) = (case for case in ZOO if case.name == name)
    compile_ours(case.make())(hidden_states())
    (graph,) = graphs
    products = [node for node in graph.graph.nodes if node.target is torch.ops.scatter_moe.parallel_linear.default]
    assert [node.args[4:7] for node in products] == [LAYOUTS[name], BY_SLOT]
