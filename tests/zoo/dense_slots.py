"""Every expert on all tokens, once for each slot or once at all; masks of one slot keep what a token chose there."""

import torch
from torch import nn

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop
from tests.zoo.sequences import SequenceLoop


class SlotMasks(MaskLoop):
    """Slots outside, experts inside, a mask of numbers, `+=`."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                mask = (ids[:, k] == e).unsqueeze(-1).to(x.dtype)
                out += mask * weights[:, k : k + 1] * expert(x)
        return out


class ExpertsOutside(MaskLoop):
    """Experts outside, each run once; the mask comes last."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = expert(x)
            for k in range(self.top_k):
                out = out + y * weights[:, k].unsqueeze(-1) * (ids[:, k] == e).unsqueeze(-1)
        return out


class WhereThenWeighted(MaskLoop):
    """`where` before the weights."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                kept = torch.where((ids[:, k] == e)[:, None], expert(x), torch.zeros_like(x))
                out = out + kept * weights[:, k, None]
        return out


class Sequences(SequenceLoop):
    """Tokens in two dims."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                out = out + expert(x) * (ids[..., k] == e).unsqueeze(-1) * weights[..., k : k + 1]
        return out


class MaskedInputs(SequenceLoop):
    """The experts read masked rows, where any token has them, and the result is masked again."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            column, weight = ids[:, :, k], weights[:, :, k].unsqueeze(-1)
            for e, expert in enumerate(self.experts):
                mask = (column == e).unsqueeze(-1)
                if not mask.any():
                    continue
                out += expert(x * mask.to(x.dtype)) * weight * mask.to(x.dtype)
        return out


class MaskedInputsOfATable(MaskLoop):
    """Masked rows of the tokens that have the expert in any slot, and the column of a table."""

    def moe(self, x, ids, weights):
        table, out = torch.zeros_like(self.gate(x)).scatter(1, ids, weights), 0
        for e, expert in enumerate(self.experts):
            others = ~(ids == e).any(dim=-1, keepdim=True)
            out = out + expert(x.masked_fill(others, 0.0)) * table[:, e : e + 1]
        return out


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(D, 4, bias=False), nn.Linear(4, D, bias=False)


class ScaledLowRank(SequenceLoop):
    """LoRA experts beside a linear layer, their gates zero outside the top-k, and a number times all that."""

    def __init__(self):
        super().__init__(expert=LowRank)
        self.base, self.scaling = nn.Linear(D, D), 0.5

    def moe(self, x, ids, weights):
        gates = torch.zeros_like(self.gate(x)).scatter(-1, ids, weights)
        out = self.base(x)
        for e, expert in enumerate(self.experts):
            out = out + gates[:, :, e].unsqueeze(-1) * expert.b(expert.a(x)) * self.scaling
        return out


CASES = (
    Case("dense_slots", SlotMasks),
    Case("dense_slots_experts_outside", ExpertsOutside),
    Case("dense_slots_where", WhereThenWeighted),
    Case("dense_slots_sequences", Sequences),
    Case("dense_slots_masked_inputs", MaskedInputs),
    Case("dense_modules_masked_inputs", MaskedInputsOfATable),
    Case("dense_modules_scaled", ScaledLowRank, activation="any", op="parallel_linear"),
)
