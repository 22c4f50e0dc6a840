"""Every expert on all tokens under masks of one slot each, almost."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.masks import MaskLoop


class DenseSlots(MaskLoop):
    """The plainest such loop, in steps of which a near miss replaces one."""

    def pairs(self):
        return [(k, e) for k in range(self.top_k) for e in range(self.num_experts)]

    def expert(self, k, e):
        return self.experts[e]

    def column(self, k):
        return k

    def after(self, weights):
        pass

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k, e in self.pairs():
            mask = (ids[:, k] == e).unsqueeze(-1)
            out = out + mask * weights[:, self.column(k), None] * self.expert(k, e)(x)
            self.after(weights)
        return out


class PairLeftOut(DenseSlots):
    """The last expert is never a second choice."""

    def pairs(self):
        return super().pairs()[:-1]


class PairTwice(DenseSlots):
    def pairs(self):
        return [(0, 0), *super().pairs()]


class WeightOfAnotherSlot(DenseSlots):
    def column(self, k):
        return self.top_k - 1 - k


class OtherExpertsBySlot(DenseSlots):
    """The second choice of expert e is another expert than the first."""

    def expert(self, k, e):
        return self.experts[(e + k) % self.num_experts]


class WeightsWritten(DenseSlots):
    """The weights are halved between two experts."""

    def route(self, x_TD):
        logits, ids, weights = super().route(x_TD)
        return logits, ids, weights.detach().clone()

    def after(self, weights):
        weights.mul_(0.5)


MISSES = (
    NearMiss("dense_slots_pair_left_out", "every_expert_is_covered", PairLeftOut),
    NearMiss("dense_slots_pair_twice", "every_expert_is_covered", PairTwice),
    NearMiss("dense_slots_weight_of_another", "every_expert_is_covered", WeightOfAnotherSlot),
    NearMiss("dense_slots_other_experts", "bodies_are_isomorphic", OtherExpertsBySlot),
    NearMiss("dense_slots_written", "nothing_is_written_inside", WeightsWritten),
)
