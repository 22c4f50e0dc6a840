"""Loops over boolean masks: of any slot of a token, of one slot, of a top-1 router's only one."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, D


class MaskLoop(Block):
    """Block with the lines before the loop factored out."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        return self.moe(x, ids, weights).view_as(hidden_states)


class AnyMaskRows(MaskLoop):
    """`m = (ids == e).any(-1)`, the weight as a masked sum over the slots, `out[m] +=`."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            if rows.any():
                weight = (weights * chosen).sum(dim=-1)[rows].unsqueeze(-1)
                out[rows] += expert(x[rows]) * weight
        return out


class AnyMaskWhere(MaskLoop):
    """The weight by `torch.where`, summed with the dim kept; rows written back with `out[m] = out[m] + ...`."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            rows = chosen.sum(dim=1) > 0
            weight = torch.where(chosen, weights, 0).sum(dim=1, keepdim=True)
            out[rows] = out[rows] + weight[rows] * expert(x[rows])
        return out


class AnyMaskArgmax(MaskLoop):
    """The slot of each row is where its mask is largest."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            rows, slot = chosen.any(-1), chosen.int().argmax(dim=-1)
            out[rows] += weights[rows, slot[rows], None] * expert(x[rows])
        return out


class AnyMaskNonzero(MaskLoop):
    """Positions of the rows, a guard on their number, the slots' weights picked by the mask itself."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            rows = chosen.any(dim=-1).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(x[rows]) * weights[chosen].unsqueeze(-1))
        return out


class ComparedWithAll(MaskLoop):
    """One comparison with the numbers of all experts; each reads its column."""

    def numbers(self):
        return torch.arange(self.num_experts, device=self.gate.weight.device)

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        chosen = ids.unsqueeze(-1) == self.numbers()
        rows = chosen.any(dim=1)
        gates = (weights.unsqueeze(-1) * chosen).sum(dim=1)
        for e, expert in enumerate(self.experts):
            tokens = rows[:, e].nonzero().flatten()
            out[tokens] += gates[tokens, e, None] * expert(x[tokens])
        return out


class DenseGateColumn(MaskLoop):
    """Weights scattered to a [T, E] table; an expert reads its column where its mask is set."""

    def moe(self, x, ids, weights):
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            out[rows] += expert(x[rows]) * gates[rows, e, None]
        return out


class MultiHot(MaskLoop):
    """One-hot ids summed over the slots; the expert's columns of mask and table, then rows of these."""

    def moe(self, x, ids, weights):
        chosen = F.one_hot(ids, self.num_experts).sum(dim=1).bool()
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = chosen[:, e]
            if not rows.any():
                continue
            out[rows] += expert(x[rows]) * gates[:, e].unsqueeze(1)[rows]
        return out


class SlotsThenExperts(MaskLoop):
    """A double loop: slots outside, experts inside, a boolean mask per pair."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class SlotColumns(MaskLoop):
    """The slots' columns are taken once, outside the loop over experts; no guard."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            chosen, weight = ids[:, k], weights[:, k].unsqueeze(-1)
            for e, expert in enumerate(self.experts):
                mask = chosen == e
                out[mask] += weight[mask] * expert(x[mask])
        return out


class ExpertsThenSlots(MaskLoop):
    """Experts outside, slots inside, positions instead of masks, one guard for all slots of an expert."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if not (ids == e).any():
                continue
            for k in range(self.top_k):
                tokens = torch.where(ids[:, k] == e)[0]
                out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens][:, k, None])
        return out


class TopOne(MaskLoop):
    """Top-1: ids and weights are vectors."""

    def __init__(self):
        super().__init__(top_k=1, normalize=False)

    def route(self, x_TD):
        logits, ids, weights = super().route(x_TD)
        return logits, ids.squeeze(-1), weights.squeeze(-1)


class Switch(TopOne):
    """Every token has one expert, so rows are assigned, not added."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * weights[mask].unsqueeze(-1)
        return out


class SwitchOneHot(TopOne):
    """Columns of a one-hot mask, an output that starts undefined, weights [T, 1] over the whole output."""

    def moe(self, x, ids, weights):
        chosen = F.one_hot(ids, self.num_experts)
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            out[chosen[:, e].bool()] = expert(x[chosen[:, e].bool()])
        return weights[:, None] * out


class SwitchDropped(TopOne):
    """Tokens above an expert's capacity are dropped: they keep their input."""

    def moe(self, x, ids, weights):
        place = (F.one_hot(ids, self.num_experts).cumsum(dim=0) - 1).gather(1, ids[:, None]).squeeze(1)
        ids = torch.where(place < x.shape[0] // 6, ids, self.num_experts)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            tokens = torch.where(ids == e)[0]
            if len(tokens) > 0:
                out[tokens] = expert(x[tokens]) * weights[tokens, None]
        return out


CASES = (
    Case("any_mask_rows", AnyMaskRows),
    Case("any_mask_where", AnyMaskWhere),
    Case("any_mask_argmax", AnyMaskArgmax),
    Case("any_mask_nonzero", AnyMaskNonzero),
    Case("any_mask_compared", ComparedWithAll),
    Case("dense_gate_column", DenseGateColumn),
    Case("multi_hot", MultiHot),
    Case("slots_then_experts", SlotsThenExperts),
    Case("slot_columns", SlotColumns),
    Case("experts_then_slots", ExpertsThenSlots),
    Case("switch_assignment", Switch, top_k=1),
    Case("switch_one_hot", SwitchOneHot, top_k=1),
    Case("switch_dropped", SwitchDropped, top_k=1),
)
