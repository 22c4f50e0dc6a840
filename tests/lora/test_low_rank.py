"""`torch.baddbmm(W, L, R)` as the weights of a loop over experts: taken apart where that means the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten

T, K, E, D, WIDTH, RANK = 24, 2, 4, 16, 12, 2


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    fresh_dynamo()


class Loop(nn.Module):
    """Experts whose one weight [E, WIDTH, D] is adapted; `adapted` is what a variant changes."""

    def __init__(self, rank: int = RANK) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.weight = nn.Parameter(torch.randn(E, WIDTH, D) * D**-0.5, requires_grad=False)
        self.lhs, self.rhs = nn.Parameter(torch.randn(E, WIDTH, rank)), nn.Parameter(torch.randn(E, rank, D))
        self.down = nn.Parameter(torch.randn(E, D, WIDTH) * WIDTH**-0.5)

    def adapted(self):
        return torch.baddbmm(self.weight, self.lhs, self.rhs, alpha=0.5)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K)
        out, adapted = torch.zeros_like(x), self.adapted()
        for e in range(E):
            token, slot = torch.where(ids == e)
            h = F.silu(F.linear(x[token], adapted[e]))
            out.index_add_(0, token, F.linear(h, self.down[e]) * weights[token, slot, None])
        return out


class Twice(Loop):
    """Two adapters of one weight."""

    def adapted(self):
        return torch.baddbmm(super().adapted(), self.lhs.flip(2), self.rhs, alpha=0.25)


class Halved(Loop):
    """beta scales what isn't low in rank."""

    def adapted(self):
        return torch.baddbmm(self.weight, self.lhs, self.rhs, beta=0.5)


class Undifferentiated(Loop):
    """No gradient flows to the factors."""

    def adapted(self):
        with torch.no_grad():
            return super().adapted()


class WrittenLater(Loop):
    """The frozen weight changes between the sum and the loop."""

    def adapted(self):
        weight = self.weight.clone()
        total = torch.baddbmm(weight, self.lhs, self.rhs)
        weight.zero_()
        return total


class Widened(Loop):
    """The sum is of another dtype than its parts."""

    def adapted(self):
        half = [tensor.to(torch.bfloat16) for tensor in (self.weight, self.lhs, self.rhs)]
        return torch.baddbmm(*half).float()


def sums_left(make) -> int:
    torch.manual_seed(0)
    module, x = make(), torch.randn(T, D, requires_grad=True)
    actual = observe(compile_ours(module, fullgraph=True), module, x)
    assert_same(actual, observe(module, module, x))
    assert rewritten() == 1 and len(graphs) == 1
    return sum("baddbmm" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("make", [Loop, Twice])
def test_taken_apart(make):
    assert sums_left(make) == 0
    assert sum("adapted_linear" in str(node.target) for node in graphs[0].graph.nodes) == 1


@pytest.mark.parametrize(
    "make", [Halved, Undifferentiated, WrittenLater, Widened, lambda: Loop(rank=7)], ids=lambda make: make.__name__
)
def test_kept_whole(make):
    """These loops are rewritten too, with the sum as their weight. Rank 7 has as many numbers as the sum."""
    assert sums_left(make) == 1
