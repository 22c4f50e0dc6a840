"""New sizes, train and eval, grad modes: a Mixture-of-Experts layer is compiled as often as one MLP in its place."""

import contextlib

import pytest
import torch

import scatter_moe
from tests.backend.harness import compile_ours, fresh_dynamo, graphs, rewritten
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.case import Case
from tests.zoo.common import Block, D, SwiGLU
from tests.zoo.segments import SegmentBlock
from tests.zoo.sorted_slots import SortedBlock
from tests.zoo.stacked import StackedBlock


class Dense(Block):
    """The same router, and one MLP for all tokens."""

    def __init__(self):
        super().__init__()
        self.experts = SwiGLU()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, _, weights = self.route(x)
        return (self.experts(x) * weights.sum(-1, keepdim=True)).view_as(hidden_states)


def stacked_list():
    block = RangeLoop()
    scatter_moe.stack_experts(block)
    return block


# (batch, tokens of each, train, grad mode)
CALLS = (
    (2, 12, True, contextlib.nullcontext),
    (2, 16, True, contextlib.nullcontext),
    (2, 21, True, contextlib.nullcontext),
    (3, 16, True, contextlib.nullcontext),
    (5, 9, True, contextlib.nullcontext),
    (2, 12, False, contextlib.nullcontext),
    (2, 12, False, torch.no_grad),
    (4, 10, False, torch.no_grad),
    (2, 12, True, torch.no_grad),
    (3, 30, True, contextlib.nullcontext),
    (2, 16, False, torch.no_grad),
)


def compiled_so_far(block) -> list[int]:
    """How many graphs there are after each call."""
    fresh_dynamo()
    module = Case(block.__name__, block).make()
    compiled, counts = compile_ours(module, fullgraph=True), []
    for batch, tokens, train, mode in CALLS:
        module.train(train)
        with mode():
            compiled(torch.randn(batch, tokens, D))
        counts.append(len(graphs))
    assert rewritten() == (0 if block is Dense else len(graphs))
    return counts


@pytest.fixture(scope="module")
def of_dense():
    return compiled_so_far(Dense)


@pytest.mark.parametrize(
    "block",
    [
        StackedBlock,
        stacked_list,
        *(pytest.param(b, marks=pytest.mark.slow) for b in (RangeLoop, HitLoop, SegmentBlock, SortedBlock)),
    ],
)
def test_no_more_than_the_dense_twin(block, of_dense):
    assert compiled_so_far(block) == of_dense
