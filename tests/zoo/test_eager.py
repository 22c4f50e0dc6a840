"""The zoo itself is sane: outputs of order one, every expert used, gradients everywhere."""

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import ZOO, hidden_states


def test_names_are_unique():
    assert len({case.name for case in ZOO}) == len(ZOO)


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_block_runs_in_eager(case):
    torch.manual_seed(0)
    module, x = case.make(), hidden_states()
    out = pytree.tree_leaves(module(x))[0]
    assert out.shape in (x.shape, x.flatten(0, -2).shape)
    assert 0.05 < out.detach().pow(2).mean().sqrt() < 20
    assert out.requires_grad == case.differentiable
    if not case.differentiable:
        return
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not name.startswith("gate"):
            assert parameter.grad is not None, f"{name} has no gradient"


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_block_runs_in_bf16(case):
    module, x = case.make(dtype=torch.bfloat16), hidden_states(dtype=torch.bfloat16)
    assert pytree.tree_leaves(module(x))[0].dtype == torch.bfloat16
