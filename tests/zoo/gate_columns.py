"""Experts that take the tokens whose gate is open, from a table of gates [T, E] that is zero outside the top-k."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, D, E, K


class GateColumns(Block):
    """Flat tokens; subclasses write the loop."""

    def gates(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids, weights / weights.sum(-1, keepdim=True))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        return self.moe(x, self.gates(self.gate(x))).view_as(hidden_states)


class Positions(GateColumns):
    """Positions of the gates above zero, and `+=`."""

    def moe(self, x, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = (gates[:, e] > 0).nonzero().squeeze(-1)
            out[tokens] += gates[tokens, e, None] * expert(x[tokens])
        return out


class Guarded(GateColumns):
    """A mask of one expert, a guard, index_add_; gates of raw logits may be negative."""

    def gates(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return torch.zeros_like(logits).scatter_(1, ids, values)

    def moe(self, x, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = torch.where(gates[:, e] != 0)[0]
            if tokens.numel() == 0:
                continue
            out.index_add_(0, tokens, expert(x[tokens]) * gates[tokens, e].unsqueeze(1))
        return out


class Closed(GateColumns):
    """ReLU closes some gates: their tokens are dropped, although rows are not weighted."""

    def gates(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(1, ids, torch.relu(values - 0.5))

    def moe(self, x, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = gates[:, e] > 0
            out[mask] += expert(x[mask])
        return out * gates.sum(-1, keepdim=True).tanh()


class Threshold(GateColumns):
    """One mask of all gates of at least 0.3; the columns of the gates are masked in turn."""

    def moe(self, x, gates):
        out, chosen = torch.zeros_like(x), gates >= 0.3
        for e, expert in enumerate(self.experts):
            out[chosen[:, e]] += expert(x[chosen[:, e]]) * gates[:, e][chosen[:, e]].unsqueeze(-1)
        return out


class OneHotGates(GateColumns):
    """Gates as one-hot rows times the weights; `nonzero` of a column itself."""

    def gates(self, logits):
        weights, ids = F.softmax(logits, dim=-1).topk(K, dim=-1)
        return (F.one_hot(ids, E) * weights.unsqueeze(-1)).sum(dim=1)

    def moe(self, x, gates):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            (tokens,) = gates[:, e].nonzero(as_tuple=True)
            out.index_add_(0, tokens, gates[tokens, e, None] * expert(x[tokens]))
        return out


class SequenceGates(GateColumns):
    """Tokens in two dims: gates [B, S, E], masks [B, S]."""

    def forward(self, x):
        gates, out = self.gates(self.gate(x)), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = gates[..., e] > 0
            if mask.any():
                out[mask] += gates[..., e][mask].unsqueeze(-1) * expert(x[mask])
        return out


class FlatGates(GateColumns):
    """Gates of tokens in two dims, flattened."""

    def forward(self, hidden_states):
        gates = self.gates(self.gate(hidden_states)).view(-1, E)
        x = hidden_states.reshape(-1, D)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = torch.nonzero(gates[:, e] > 0).flatten()
            out[tokens] += gates[tokens, e, None] * expert(x[tokens])
        return out.view_as(hidden_states)


CASES = (
    Case("gate_columns_positions", Positions),
    Case("gate_columns_guarded", Guarded),
    Case("gate_columns_closed", Closed),
    Case("gate_columns_threshold", Threshold),
    Case("gate_columns_one_hot", OneHotGates),
    Case("gate_columns_sequences", SequenceGates),
    Case("gate_columns_flat", FlatGates),
)
