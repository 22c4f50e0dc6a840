"""The near misses themselves run in eager, forward and (where they have gradients) backward, on two unequal inputs."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.near_misses import NEAR_MISSES
from tests.zoo import hidden_states


def test_names_are_unique():
    assert len({miss.name for miss in NEAR_MISSES}) == len(NEAR_MISSES)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("miss", NEAR_MISSES, ids=lambda miss: miss.name)
def test_near_miss_runs_in_eager(miss):
    module = miss.make()
    for seed in range(2):
        torch.manual_seed(seed)
        out = pytree.tree_leaves(module(hidden_states(seed=seed)))[0]
        assert out.isfinite().all()
        if out.requires_grad:
            out.backward(torch.randn_like(out))
