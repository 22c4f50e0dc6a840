"""A function with a loop is left alone for callers that overwrite what its experts read, not for others.

It is a frame of its own in each of these programs: what its caller does afterwards can't be seen from there.
"""

import pytest
import torch
from torch import nn

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.near_misses.callers import BiasedLoop, run_experts, scale_bias
from tests.near_misses.common import NearMiss
from tests.zoo import hidden_states
from tests.zoo.common import D


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


def doubled(x, ids, weights, experts):
    return 2 * run_experts(x, ids, weights, experts)


class Writer(BiasedLoop):
    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = doubled(x, ids, weights, self.experts)
        scale_bias(self.experts)
        return out.view_as(hidden_states)


class Reader(BiasedLoop):
    @torch.compiler.disable(recursive=False)
    def moe(self, x, ids, weights):
        return doubled(x, ids, weights, self.experts)


class Layers(nn.Module):
    """A graph break in a loop makes Dynamo run the frame in eager: all that it calls are frames of their own."""

    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


def assert_as_eager(block):
    """Called twice, for which code is reused, or was compiled for others."""
    eager, module = (NearMiss("", None, block).make() for _ in range(2))
    call = compile_ours(module)
    for seed in range(2):
        x = hidden_states(seed=seed)
        expected = observe(eager, eager, x, seed=seed)
        assert_same(observe(call, module, hidden_states(seed=seed), seed=seed), expected)


@pytest.mark.parametrize("writer_first", [False, True])
def test_rewritten_for_others(writer_first):
    """Code for the one caller isn't the other's. What was compiled before the second was seen is dropped."""
    for writes in (writer_first, not writer_first, writer_first):
        before = rewritten()
        if writes:
            assert_as_eager(Writer)
            assert rewritten() == before
        else:
            assert_as_eager(Reader)
    assert rewritten() == (1 if writer_first else 2)


def test_in_a_frame_that_runs_in_eager():
    assert_as_eager(lambda: Layers(Writer))
    assert rewritten() == 0
