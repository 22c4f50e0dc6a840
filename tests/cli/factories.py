"""Models that the tests of the command line explain, as a user would write them."""

import torch
from torch import nn

D, E, K = 8, 4, 2


class Naive(nn.Module):
    """A loop over experts; with `leaks` it also returns how many rows an expert had, which no rewrite may lose."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.leaks = leaks
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D)) for _ in range(E))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(K)
        out, count = torch.zeros_like(x), torch.zeros(())
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y = expert(x[token])
            if self.leaks:
                count = count + y.sum()
            out.index_add_(0, token, y * weights[token, slot, None])
        return out, count


def rewritten():
    return Naive(leaks=False), (torch.randn(16, D),)


def left_alone():
    return Naive(leaks=True), {"x": torch.randn(16, D)}


def model_alone():
    return Naive(leaks=False)


def broken():
    return nn.Linear(D, D), (torch.randn(16, D + 1),)
