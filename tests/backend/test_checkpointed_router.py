"""A checkpointed router before the loop: Dynamo replaces the results of a checkpoint while it traces."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.zoo.common import D, E, K, SwiGLU


class CheckpointedRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))

    def route(self, x):
        scores = self.gate(x).softmax(-1)
        weights, ids = scores.topk(K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids, scores

    def forward(self, x):
        weights, ids, _ = checkpoint(self.route, x, use_reentrant=False)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, choices = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, choices, None])
        return out


@pytest.mark.parametrize("train", [True, False])
def test_experts_after_a_checkpointed_router(train):
    fresh_dynamo()
    torch.manual_seed(0)
    model = CheckpointedRouter().train(train)
    x = torch.randn(9, D, requires_grad=True)
    eager = observe(model, model, x)
    ours = observe(compile_ours(model), model, x)
    assert_same(ours, eager)
    assert rewritten() == 1
