"""Layers of which one reads what another gives, with nothing in between: both are rewritten, and equal to eager."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, observe, rewritten
from tests.zoo.common import FF, D, E, K, SwiGLU, unit_scale_


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(E))
        self.up = nn.Parameter(torch.empty(E, D, FF))
        self.down = nn.Parameter(torch.empty(E, FF, D))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return weights, ids, torch.zeros(x.shape[0], E).scatter(1, ids, weights)


def added_up(layer, x, start=0):
    _, _, table = layer(x)
    for e, expert in enumerate(layer.experts):
        start = start + table[:, e, None] * expert(x)
    return start


def stacked(layer, x):
    _, _, table = layer(x)
    return (torch.stack([expert(x) for expert in layer.experts], dim=1) * table.unsqueeze(-1)).sum(dim=1)


def multiplied(layer, x):
    _, _, table = layer(x)
    h = torch.einsum("td,edf->etf", x, layer.up)
    return (torch.bmm(F.silu(h), layer.down) * table.t().unsqueeze(-1)).sum(dim=0)


def cut(layer, x):
    weights, ids, _ = layer(x)
    order = ids.view(-1).argsort()
    tokens, counts = order // K, ids.view(-1).bincount(minlength=E).tolist()
    parts = zip(layer.experts, x[tokens].split(counts), strict=True)
    rows = torch.cat([expert(part) for expert, part in parts])
    return torch.zeros_like(x).index_add(0, tokens, rows * weights.view(-1)[order].unsqueeze(-1))


def in_turn(way, first, second, x):
    return way(second, way(first, x))


def onto(way, first, second, x):
    return added_up(second, x, way(first, x))


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.second = way, Layer(), Layer()

    def forward(self, hidden_states):
        return self.way(self.first, self.second, hidden_states)


CHAINS = {
    **{f"{way.__name__}_twice": partial(in_turn, way) for way in (added_up, stacked, multiplied, cut)},
    **{f"onto_{way.__name__}": partial(onto, way) for way in (added_up, stacked, multiplied, cut)},
}


@pytest.mark.parametrize("way", CHAINS.values(), ids=CHAINS)
def test_chained_layers_are_rewritten_and_equal(way):
    fresh_dynamo()
    torch.manual_seed(0)
    module = unit_scale_(Model(way))
    compiled, x = compile_ours(module, inner="counting_eager"), torch.randn(12, D, requires_grad=True)
    assert_same(observe(compiled, module, x), observe(module, module, x))
    assert rewritten() == 2
