"""What is made of the experts' numbers of tokens beside the experts: losses, running counts, biases of the router."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class Loads(MaskLoop):
    """A loss of the fractions of tokens, counted after the loop."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        load = torch.bincount(ids.flatten(), minlength=self.num_experts)
        return out + (load / x.shape[0]).square().sum()


class LoadsFirst(MaskLoop):
    """The numbers skip experts, and scale the output."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        load = ids.flatten().bincount(minlength=self.num_experts)
        for e, count in enumerate(load.tolist()):
            if count == 0:
                continue
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * (load.float().std() + 1)


class LoadBias(MaskLoop):
    """DeepSeek-V3's balance without a loss: a bias of the choice follows the numbers of tokens."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.zeros(self.num_experts))
        self.register_buffer("seen", torch.zeros(self.num_experts))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        scores = self.gate(x).sigmoid()
        ids = (scores + self.bias).topk(self.top_k, dim=-1).indices
        out = self.moe(x, ids, scores.gather(1, ids))
        if self.training:
            with torch.no_grad():
                load = torch.bincount(ids.flatten(), minlength=self.num_experts).float()
                self.seen += load
                self.bias.add_(torch.sign(load.mean() - load), alpha=0.01)
        return out.view_as(hidden_states)

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class CountedInside(MaskLoop):
    """A buffer of the module has the numbers of all calls, counted expert by expert."""

    def __init__(self):
        super().__init__()
        self.register_buffer("usage", torch.zeros(self.num_experts, dtype=torch.int64))

    def count(self, e, tokens):
        self.usage[e] += len(tokens)

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            self.count(e, tokens)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class CountedOfHit(CountedInside):
    """Counted for those experts alone that have a token."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            tokens, slots = torch.where(ids == e)
            self.count(e, tokens)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class AssignedInside(MaskLoop):
    """A tensor of this call, into which each number is put; whole numbers are added to it once more."""

    def moe(self, x, ids, weights):
        out, load = torch.zeros_like(x), torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        for e, expert in enumerate(self.experts):
            m = (ids == e).any(-1)
            load[e] = m.nonzero().shape[0]
            load[e] += x[m].shape[0]
            out[m] += expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]
        return out * load.float().std()


class SummedInside(MaskLoop):
    """A buffer of floats, to which the mask of each expert that has tokens is added up."""

    def __init__(self):
        super().__init__()
        self.register_buffer("usage", torch.zeros(self.num_experts, dtype=torch.float32))

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = (ids == e).any(-1)
            if m.any():
                out[m] += expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]
                if self.training:
                    with torch.no_grad():
                        self.usage[e] += m.sum().float()
        return out


class SummedBySlot(SummedInside):
    """Once for each slot that an expert has tokens in."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                m = ids[:, k] == e
                if m.any():
                    out[m] += weights[m, k].unsqueeze(-1) * expert(x[m])
                    self.usage[e] += m.float().sum()
        return out


CASES = (
    Case("loads_after", Loads),
    Case("loads_first", LoadsFirst),
    Case("loads_bias", LoadBias),
    Case("loads_counted_inside", CountedInside),
    Case("loads_counted_of_hit", CountedOfHit),
    Case("loads_assigned_inside", AssignedInside),
    Case("loads_summed_inside", SummedInside),
    Case("loads_summed_by_slot", SummedBySlot),
)
