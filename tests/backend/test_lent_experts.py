"""Experts that are held by another module than the one whose forward loops over them."""

import pytest
import torch
from torch import nn

from tests.backend.harness import fresh_dynamo
from tests.backend.test_changes_after_compile import assert_followed
from tests.zoo.case import Case
from tests.zoo.common import Block, D, E, SwiGLU


class Layer(Block):
    """The loop; it is unrolled, since experts are not alike."""

    def __init__(self):
        super().__init__()
        del self.experts

    def forward(self, hidden_states, experts):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))
        for number, expert in enumerate(self.experts):
            expert.number = number

    def forward(self, hidden_states):
        return self.layer(hidden_states, self.experts)


def hook(model):
    model.experts[1].register_forward_hook(lambda _module, _args, out: out * 2)


def backward_hook(model):
    model.experts[1].register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 2,))


@pytest.mark.parametrize("change", [hook, backward_hook])
def test_hook_on_lent_expert_is_followed(change):
    fresh_dynamo()
    case = Case("lent", Model)
    assert_followed(change, case.make(), case.make())
