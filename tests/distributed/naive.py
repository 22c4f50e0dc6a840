"""Naive MoE blocks between dense layers that are large enough for several DDP buckets, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, FF, E, K = 8, 4, 4, 2
DENSE = 16_384  # two matrices of D x DENSE are 2 MiB, more than DDP's first bucket holds


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        return ids, weights / weights.sum(-1, keepdim=True)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, FF, bias=False)
        self.up_proj = nn.Linear(D, FF, bias=False)
        self.down_proj = nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ListBlock(Router):
    """A range loop over a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, choice, None])
        return out


class StackedBlock(Router):
    """A loop over the experts that were hit, on stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * FF, D) / D**0.5)
        self.down_proj = nn.Parameter(torch.randn(E, D, FF) / FF**0.5)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, E).permute(2, 1, 0)
            hit = mask.sum(dim=(-1, -2)).greater(0).nonzero()
        for e in hit:
            e = e[0]
            choice, token = torch.where(mask[e])
            gate, up = F.linear(x[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e]) * weights[token, choice, None]
            out.index_add_(0, token, y)
        return out


class Layer(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(D, DENSE), nn.SiLU(), nn.Linear(DENSE, D))
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x)
        return x + self.moe(x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(block()) for block in (ListBlock, StackedBlock, ListBlock)]).double()
