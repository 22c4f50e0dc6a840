"""Tokens that stay in two dims, a batch of sequences, all the way through the loop or in a part of it."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, D


class SequenceLoop(Block):
    """Ids and weights [B, S, K]."""

    def forward(self, hidden_states):
        weights, ids = torch.topk(F.softmax(self.gate(hidden_states), dim=-1), self.top_k, dim=-1)
        return self.moe(hidden_states, ids, weights)


class SequenceMask(SequenceLoop):
    """`out[m] += ...` with a mask [B, S]; the rows are picked by the same mask, flattened."""

    def moe(self, x, ids, weights):
        gates = weights.new_zeros(*ids.shape[:-1], self.num_experts).scatter(-1, ids, weights)
        out, flat_x, flat_gates = torch.zeros_like(x), x.view(-1, x.size(-1)), gates.view(-1, gates.size(-1))
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            flat_mask = mask.view(-1)
            if flat_mask.any():
                rows = expert(flat_x[flat_mask]) * flat_gates[flat_mask, e].unsqueeze(1)
                out[mask] += rows.squeeze(1)
        return out


class SequenceRows(SequenceLoop):
    """Rows, weights and output by one mask [B, S]."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            mask = chosen.any(-1)
            out[mask] += expert(x[mask]) * (weights * chosen).sum(-1)[mask].unsqueeze(-1)
        return out


class SequenceWhere(SequenceLoop):
    """Three positions, of which two are the token."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                b, s, k = torch.where(mask)
                out[b, s] += expert(x[b, s]) * weights[b, s, k].unsqueeze(-1)
        return out


class SequenceSlots(SequenceLoop):
    """A loop over slots, too."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                mask = ids[..., k] == e
                if mask.any():
                    out[mask] += weights[..., k][mask].unsqueeze(-1) * expert(x[mask])
        return out


class SequenceFlatOutput(SequenceLoop):
    """Everything flat but the ids; the output is a view of zeros."""

    def moe(self, x, ids, weights):
        flat, flat_weights = x.view(-1, D), weights.view(-1, self.top_k)
        out = torch.zeros_like(x).view(-1, D)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where((ids == e).view(-1, self.top_k))
            out.index_add_(0, tokens, expert(flat[tokens]) * flat_weights[tokens, slots, None])
        return out.view_as(x)


class SequenceFlatColumns(SequenceLoop):
    """A loop over slots whose columns of ids and weights are flattened, as the tokens are."""

    def moe(self, x, ids, weights):
        flat = x.reshape(-1, D)
        out = torch.zeros_like(flat)
        for k in range(self.top_k):
            column, weight = ids[..., k].flatten(), weights[:, :, k].reshape(-1)
            for e, expert in enumerate(self.experts):
                mask = column == e
                if mask.any():
                    out[mask] += weight[mask].unsqueeze(-1) * expert(flat[mask])
        return out.view_as(x)


class SequenceFlatColumnOfZeros(SequenceLoop):
    """The same with positions, added to a view of zeros [B, S, D]; experts outside."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        flat, flat_out = x.view(-1, D), out.view(-1, D)
        for e, expert in enumerate(self.experts):
            for k in range(self.top_k):
                tokens = torch.where(ids[:, :, k].reshape(-1) == e)[0]
                flat_out.index_add_(0, tokens, expert(flat[tokens]) * weights[..., k].reshape(-1)[tokens, None])
        return flat_out.view_as(x)


class SequenceFlatColumnAssigned(SequenceLoop):
    """An output for each slot, weighted inside."""

    def moe(self, x, ids, weights):
        flat = x.reshape(-1, D)
        out = torch.zeros_like(flat)
        for k in range(self.top_k):
            column, weight, y = ids[..., k].reshape(-1), weights[..., k].reshape(-1, 1), torch.zeros_like(flat)
            for e, expert in enumerate(self.experts):
                mask = column == e
                y[mask] = expert(flat[mask]) * weight[mask]
            out = out + y
        return out.view_as(x)


CASES = (
    Case("sequence_mask", SequenceMask),
    Case("sequence_rows", SequenceRows),
    Case("sequence_where", SequenceWhere),
    Case("sequence_slots", SequenceSlots),
    Case("sequence_flat_output", SequenceFlatOutput),
    Case("sequence_flat_columns", SequenceFlatColumns),
    Case("sequence_flat_column_of_zeros", SequenceFlatColumnOfZeros),
    Case("sequence_flat_column_assigned", SequenceFlatColumnAssigned, top_k=1, regions=2),
)
