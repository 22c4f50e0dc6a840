"""Experts that compute nothing beside those that do (LongCat-Flash, MoE++), and a norm that all experts share."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K
from tests.zoo.numbers import hits
from tests.zoo.stacked import StackedBlock, StackedExperts


class WithIdentityExperts(nn.Module):
    """Ids from E on are of identity experts; gate_up_proj has rows for them too (longcat_flash)."""

    identity_experts = E

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E + self.identity_experts, 2 * FF, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, FF))

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E + self.identity_experts).permute(2, 1, 0)
        for hit in hits(mask):
            e = int(hit.item())
            slots, tokens = torch.where(mask[e].squeeze(0))
            if tokens.numel() == 0:
                continue
            y = self.free(x[tokens], e, out) if e >= E else self.expert(x[tokens], e)
            out.index_add_(0, tokens, (y * weights[tokens, slots, None]).to(x.dtype))
        return out

    def expert(self, rows, e):
        gate, up = F.linear(rows, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj[e])

    def free(self, rows, _e, _out):
        return rows


class Constant(WithIdentityExperts):
    """One vector for all rows of all experts that have no weights."""

    def __init__(self):
        super().__init__()
        self.constant = nn.Parameter(torch.empty(D))

    def free(self, rows, _e, _out):
        return torch.zeros_like(rows) + self.constant


class ScaledNorm(nn.Module):
    """1 + weight, then a norm in float32: its scale is computed anew for each expert."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))

    def forward(self, x):
        scaled = (x.float() * (1.0 + self.weight).float()).type_as(x).float()
        return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class SharedNorm(StackedExperts):
    """A norm after each expert, the same for all (muse_spark)."""

    def __init__(self):
        super().__init__()
        self.norm = ScaledNorm()

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts + 1).permute(2, 1, 0)
        for e in hits(mask):
            e = e[0]
            if e == self.num_experts:
                continue
            slots, tokens = torch.where(mask[e])
            gate, up = F.linear(x[tokens], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = self.norm(F.linear(F.silu(gate) * up, self.down_proj[e]))
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class MoreClasses(StackedExperts):
    """`.item()` where `one_hot` was told of one class more than the router chooses from (nemotron_h)."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts + 1).permute(2, 1, 0)
        for e in hits(mask).squeeze(-1):
            e = e.item()
            slots, tokens = torch.where(mask[e])
            gate, up = F.linear(x[tokens], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


def block(experts):
    """Behind a router that knows experts without parameters, too."""
    return lambda: StackedBlock(experts, num_experts=2 * E, top_k=K + 1)


CASES = (
    Case("hit_identity_experts", block(WithIdentityExperts), top_k=K + 1, op=None, regions=2),
    Case("hit_constant_experts", block(Constant), top_k=K + 1, op=None, must_rewrite=False),
    Case("hit_shared_norm", lambda: StackedBlock(SharedNorm), op="parallel_linear", activation=None),
    Case("hit_item_more_classes", lambda: StackedBlock(MoreClasses)),
)
