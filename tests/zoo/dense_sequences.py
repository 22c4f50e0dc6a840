"""Every expert on every token at once, tokens in two dims: by einsum, or cut into batch and sequence before the sum."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, D, E, K


class SequenceExperts(nn.Module):
    """Experts [E, in, out] on [B, S, E]; the steps apart, for variants."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * FF))
        self.down_proj = nn.Parameter(torch.empty(E, FF, D))

    def table(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return torch.zeros_like(logits).scatter_(-1, ids, weights)

    def activate(self, h):
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def add_up(self, y, table):
        return torch.einsum("bse,bsed->bsd", table, y)

    def forward(self, x):
        table = self.table(self.gate(x))
        h = self.activate(torch.einsum("bsd,edf->bsef", x, self.gate_up_proj))
        return self.add_up(torch.einsum("bsef,efd->bsed", h, self.down_proj), table)


class ExpertsFirst(SequenceExperts):
    """[E, B, S], a product and a sum."""

    def forward(self, x):
        table = self.table(self.gate(x)).permute(2, 0, 1)
        h = self.activate(torch.einsum("bsd,edf->ebsf", x, self.gate_up_proj))
        y = torch.einsum("ebsf,efd->ebsd", h, self.down_proj)
        return (y * table.unsqueeze(-1)).sum(dim=0)


class CutBeforeSum(SequenceExperts):
    """gpt-oss and Qwen3-VL of transformers 4.57 in inference: flat tokens, cut in two at the end."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * FF))

    def weigh(self, y, table, batch_size):
        y = y.view(E, batch_size, -1, D)
        return y * table.transpose(0, 1).view(E, batch_size, -1)[..., None]

    def forward(self, hidden_states):
        batch_size = hidden_states.shape[0]
        x = hidden_states.reshape(-1, D)
        table = self.table(self.gate(x))
        rows = x.repeat(E, 1).view(E, -1, D)
        h = self.activate(torch.bmm(rows, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :])
        return self.weigh(torch.bmm(h, self.down_proj), table, batch_size).sum(dim=0)


CASES = (
    Case("dense_sequences_einsum", SequenceExperts),
    Case("dense_sequences_experts_first", ExpertsFirst),
    Case("dense_sequences_cut", CutBeforeSum),
)
