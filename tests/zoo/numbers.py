"""Loops that use the expert's number as such, and tokens that were dropped from a one-hot tensor."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import FF, Block, D, E, SwiGLU


def hits(mask):
    return torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()


class NamedExperts(nn.ModuleDict):
    """Experts found by name: nllb_moe, switch_transformers."""

    def __init__(self):
        super().__init__({f"expert_{e}": SwiGLU() for e in range(E)})

    def forward(self, x, mask, weights):
        out = torch.zeros_like(x)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            rows = x[None, tokens].reshape(-1, D)
            out.index_add_(0, tokens, self[f"expert_{e[0]}"](rows) * weights[tokens, slots, None])
        return out


class ByName(Block):
    def __init__(self):
        super().__init__()
        self.experts = NamedExperts()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        return self.experts(x, F.one_hot(ids, E).permute(2, 1, 0), weights).view_as(hidden_states)


class ByItem(Block):
    """`.item()` as an index of modules, `int()` of it as another."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in hits(mask):
            number = int(e.item())
            slots, tokens = torch.where(mask[number])
            out.index_add_(0, tokens, self.experts[int(e)](x[tokens]) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


class Dropped(nn.Module):
    """Top-1; in each sequence an expert takes its first tokens and drops the others (switch_transformers)."""

    capacity = 4

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = NamedExperts()

    def kept(self, one_hot):
        return one_hot * (torch.cumsum(one_hot, dim=-2) <= self.capacity)

    def chosen(self, logits):
        return self.kept(F.one_hot(logits.argmax(dim=-1), E))

    def forward(self, hidden_states):
        logits = self.gate(hidden_states)
        chosen = self.chosen(logits).view(-1, 1, E).permute(2, 1, 0)
        weights = torch.max(logits.softmax(dim=-1), dim=-1).values.view(-1, 1)
        return self.experts(hidden_states.view(-1, D), chosen, weights).view(hidden_states.shape)


class DroppedPadding(Dropped):
    """Padding is dropped too, by a mask that became a number."""

    def kept(self, one_hot):
        padding = torch.arange(one_hot.shape[1], device=one_hot.device) < 2
        return super().kept(one_hot) * (~padding)[:, None].expand(one_hot.shape).to(one_hot.dtype)


class DroppedChoice(Dropped):
    """Tokens of all sequences stand in one dim, with their one choice in the next (switch_transformers 5.17)."""

    def kept(self, one_hot):
        return one_hot * (torch.cumsum(one_hot, dim=0) <= self.capacity)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, D)
        weights, ids = self.gate(x).softmax(dim=-1).max(dim=-1, keepdim=True)
        chosen = self.kept(F.one_hot(ids, E)).permute(2, 1, 0)
        return self.experts(x, chosen, weights).view(hidden_states.shape)


class DroppedSequences(Dropped):
    """Tokens stay in sequences, and those that were dropped keep their rows (switch_transformers 4.36)."""

    def run(self, x, chosen):
        out = x.clone()
        for e, expert in enumerate(self.experts.values()):
            rows = chosen[:, :, e].bool()
            out[rows] = expert(x[rows]).to(out.dtype)
        return out

    def forward(self, hidden_states):
        logits = self.gate(hidden_states)
        weights = torch.max(logits.softmax(dim=-1), dim=-1).values.unsqueeze(-1)
        return self.run(hidden_states, self.chosen(logits)) * weights


class DroppedListed(DroppedSequences):
    """The experts that kept a token, as a list of numbers (switch_transformers 4.57)."""

    def listed(self, mask):
        return mask.reshape(-1, E).sum(dim=0).nonzero(as_tuple=True)[0].tolist()

    def run(self, x, chosen):
        out, mask = torch.zeros(x.shape, dtype=x.dtype, device=x.device), chosen.bool()
        numbers = self.listed(mask)
        for e in numbers:
            out[mask[:, :, e]] = self.experts[f"expert_{e}"](x[mask[:, :, e]])
        return out


class FlatWeights(nn.Module):
    """Weights [E * F, D], viewed anew for each expert; one class more than there are experts (dbrx)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.up = nn.Parameter(torch.empty(E * FF, D))
        self.down = nn.Parameter(torch.empty(E * FF, D))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        weights, ids = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        mask = F.one_hot(ids, E + 1).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in hits(mask):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            up, down = self.up.view(-1, FF, D)[e], self.down.view(-1, FF, D)[e]
            y = F.silu(x[tokens].matmul(up.T)).matmul(down)
            out.index_add_(0, tokens, y.view(-1, D) * weights[tokens, slots, None])
        return out.view_as(hidden_states)


CASES = (
    Case("expert_by_name", ByName),
    Case("expert_by_item", ByItem),
    Case("dropped_one_hot", Dropped, top_k=1),
    Case("dropped_one_hot_padding", DroppedPadding, top_k=1),
    Case("dropped_choice", DroppedChoice, top_k=1),
    Case("dropped_sequences", DroppedSequences, top_k=1, activation="any", op="parallel_linear"),
    Case("dropped_listed", DroppedListed, top_k=1),
    Case("hit_flat_weights", FlatWeights, op=None),
)
