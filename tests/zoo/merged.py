"""Weights that each expert computes of its own parameters: LoRA merged in the loop, a matrix that is normalised."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, SwiGLU
from tests.zoo.dense_modules import SumOfProducts
from tests.zoo.segments import SegmentBlock
from tests.zoo.stacked import TopKRouter

RANK = 2


class Merged(SwiGLU):
    """The first matrix is merged with a product of two thin ones."""

    def __init__(self):
        super().__init__()
        self.scale = 0.5
        self.lora_a, self.lora_b = nn.Parameter(torch.empty(RANK, D)), nn.Parameter(torch.empty(FF, RANK))

    def delta(self):
        return self.lora_b @ self.lora_a * self.scale

    def forward(self, x):
        gate = F.linear(x, self.w1.weight + self.delta())
        return self.w2(self.act_fn(gate) * self.w3(x))


class Normalised(SwiGLU):
    """DoRA: the rows of a matrix have a length of their own."""

    def __init__(self):
        super().__init__()
        self.length = nn.Parameter(torch.empty(FF))

    def forward(self, x):
        weight = self.w1.weight / self.w1.weight.norm(dim=1, keepdim=True)
        return self.w2(self.act_fn(F.linear(x, weight * self.length[:, None])) * self.w3(x))


class MergedLoop(Block):
    """A loop over modules; experts without tokens compute nothing."""

    def __init__(self, expert=Merged):
        super().__init__(expert)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if tokens.numel() == 0:
                continue
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class MergedStacked(nn.Module):
    """All of it stacked, transposed after it is merged; every expert runs."""

    def __init__(self):
        super().__init__()
        self.gate = TopKRouter()
        self.up, self.down = nn.Parameter(torch.empty(E, FF, D)), nn.Parameter(torch.empty(E, D, FF))
        self.lora_a, self.lora_b = nn.Parameter(torch.empty(E, RANK, D)), nn.Parameter(torch.empty(E, FF, RANK))

    def merged(self, e):
        return self.up[e] + 0.5 * torch.matmul(self.lora_b[e], self.lora_a[e])

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            h = F.silu(x[tokens] @ self.merged(e).t())
            out.index_add_(0, tokens, h @ self.down[e].t() * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class MergedOfHit(MergedStacked):
    """A loop over the experts that were hit, without their numbers."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            e = e[0]
            slots, tokens = torch.where(mask[e])
            h = F.silu(F.linear(x[tokens], self.merged(e)))
            out.index_add_(0, tokens, F.linear(h, self.down[e]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


CASES = (
    Case("merged_loop", MergedLoop),
    Case("merged_normalised", lambda: MergedLoop(Normalised)),
    Case("merged_stacked", MergedStacked),
    Case("merged_of_hit", MergedOfHit),
    Case("merged_dense_modules", lambda: SumOfProducts(Merged)),
    Case("merged_segments", lambda: SegmentBlock(Merged)),
)
