"""Every slot takes a copy of its expert's weights: batched_mm of transformers 5, gpt-fast, the reference of gpt-oss."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K
from tests.zoo.sorted_slots import SortedBlock


class EinsumExperts(nn.Module):
    """Weights [T, K, out, in], einsum; gate and up apart. The steps apart, for variants to replace."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(E, FF, D))
        self.w2 = nn.Parameter(torch.empty(E, D, FF))
        self.w3 = nn.Parameter(torch.empty(E, FF, D))

    def up(self, x, ids):
        gate = F.silu(torch.einsum("ti,taoi -> tao", x, self.w1[ids]))
        return gate * torch.einsum("ti, taoi -> tao", x, self.w3[ids])

    def down(self, h, ids):
        return torch.einsum("tao, taio -> tai", h, self.w2[ids])

    def add_up(self, y, weights):
        return torch.einsum("tai,ta -> ti", y, weights)

    def forward(self, x, ids, weights):
        return self.add_up(self.down(self.up(x, ids), ids), weights)


class ExpertsFromTheEnd(EinsumExperts):
    """-1 is the last expert."""

    def forward(self, x, ids, weights):
        return super().forward(x, ids - 1, weights)


class ClampedExperts(EinsumExperts):
    """One product for gate and up, interleaved, with biases; the one of `down` is added in place."""

    limit = 1.497

    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Parameter(torch.empty(E, 2 * FF, D)), None
        self.w1_bias = nn.Parameter(torch.empty(E, 2 * FF))
        self.w2_bias = nn.Parameter(torch.empty(E, D))

    def up(self, x, ids):
        h = torch.einsum("beck,bk->bec", self.w1[ids, ...], x) + self.w1_bias[ids, ...]
        gate = h[..., ::2].clamp(min=None, max=self.limit)
        up = h[..., 1::2].clamp(min=-self.limit, max=self.limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def down(self, h, ids):
        y = torch.einsum("beck,bek->bec", self.w2[ids, ...], h)
        y += self.w2_bias[ids, ...]
        return y


class MatmulExperts(EinsumExperts):
    """Weights [E, in, out], no gate, matmul with a dim of size one, a product with the weights and a sum."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Parameter(torch.empty(E, D, FF)), nn.Parameter(torch.empty(E, FF, D)), None

    def up(self, x, ids):
        return F.gelu(x[:, None, None, :] @ self.w1[ids])

    def down(self, h, ids):
        return (h @ self.w2[ids]).squeeze(2)

    def add_up(self, y, weights):
        return (y * weights[..., None]).sum(dim=1)


class NormedExperts(EinsumExperts):
    """A norm over each expert's output: no MLP that one op computes."""

    def add_up(self, y, weights):
        return super().add_up(F.rms_norm(y, (D,), eps=1e-6), weights)


class BatchedExperts(nn.Module):
    """Flat slots and bmm; ids of E and more are clamped, and their weights are zero."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * FF, D))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, D, FF))

    def repeated(self, x):
        return x.repeat_interleave(K, dim=0)

    def experts_of(self, ids):
        return ids.reshape(-1).clamp(0, E - 1)

    def linear(self, rows, weight):
        return torch.bmm(weight, rows.unsqueeze(-1)).squeeze(-1)

    def up(self, rows, experts):
        h = self.linear(rows, self.gate_up_proj[experts])
        h.add_(self.gate_up_proj_bias[experts])
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x, ids, weights):
        rows, flat = self.repeated(x), weights.reshape(-1).masked_fill(ids.reshape(-1) >= E, 0.0)
        experts = self.experts_of(ids)
        rows = self.linear(self.up(rows, experts), self.down_proj[experts])
        return (rows * flat.unsqueeze(-1)).view(x.size(0), K, D).sum(dim=1).to(x.dtype)


CASES = (
    Case("gathered_einsum", lambda: SortedBlock(EinsumExperts)),
    Case("gathered_from_the_end", lambda: SortedBlock(ExpertsFromTheEnd)),
    Case("gathered_clamped", lambda: SortedBlock(ClampedExperts), activation="clamped_swiglu"),
    Case("gathered_matmul", lambda: SortedBlock(MatmulExperts), activation="gelu"),
    Case("gathered_norm", lambda: SortedBlock(NormedExperts), activation="any", op="parallel_linear"),
    Case("gathered_batched_mm", lambda: SortedBlock(BatchedExperts)),
    Case("gathered_expert_parallel", lambda: SortedBlock(BatchedExperts, elsewhere=2)),
)
