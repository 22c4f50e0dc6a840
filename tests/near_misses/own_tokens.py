"""Weights of an expert's own tokens: of ids that repeat, of another expert, of ids that were changed, not summed."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.masks import MaskLoop


class OwnLoop(MaskLoop):
    """The plainest such loop, in steps of which a near miss replaces one."""

    def prepare(self, ids, weights):
        return ids, weights

    def chosen(self, ids, rows, e):
        return ids[rows] == e

    def weight(self, weights, chosen):
        return (weights * chosen).sum(dim=-1, keepdim=True)

    def moe(self, x, ids, weights):
        ids, weights = self.prepare(ids, weights)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            out[rows] += self.experts[e](x[rows]) * self.weight(weights[rows], self.chosen(ids, rows, e))
        return out


class RepeatedIds(OwnLoop):
    """A token may have an expert twice."""

    def prepare(self, ids, weights):
        return ids.clamp(max=self.num_experts - 3), weights


class AnotherExpert(OwnLoop):
    """What the next expert weighs for these tokens."""

    def chosen(self, ids, rows, e):
        return ids[rows] == (e + 1) % self.num_experts


class ChangedIds(OwnLoop):
    """The expert before the last has the weights of the last one, too."""

    def chosen(self, ids, rows, e):
        return ids[rows].clamp(max=self.num_experts - 2) == e


class OtherOrder(OwnLoop):
    """The ids of the tokens in reverse."""

    def chosen(self, ids, rows, e):
        return ids[rows].flip(0) == e


class Averaged(OwnLoop):
    """A mean over the slots divides by their number."""

    def weight(self, weights, chosen):
        return (weights * chosen).mean(dim=-1, keepdim=True)


class FirstSlot(OwnLoop):
    """Zero where the expert is a token's second."""

    def weight(self, weights, chosen):
        return (weights * chosen)[:, :1]


class OneWeightForAllSlots(OwnLoop):
    """The sum repeats a token's one weight."""

    def prepare(self, ids, weights):
        return ids, weights[:, :1]


class SlotsOfOtherRows(MaskLoop):
    """Each slot has a row, each token with the expert a weight: not as many, where ids repeat."""

    def moe(self, x, ids, weights):
        ids = ids // 4
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, _ = torch.where(ids == e)
            rows = (ids == e).any(dim=-1)
            slots = (ids[rows] == e).int().argmax(dim=-1)
            own = weights[rows, slots].repeat_interleave(self.top_k)[: len(tokens)]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * own.unsqueeze(-1))
        return out


BODIES = "bodies_are_isomorphic"

MISSES = (
    NearMiss("own_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("own_of_another_expert", BODIES, AnotherExpert),
    NearMiss("own_changed_ids", BODIES, ChangedIds),
    NearMiss("own_in_reverse", BODIES, OtherOrder),
    NearMiss("own_averaged", BODIES, Averaged),
    NearMiss("own_first_slot", BODIES, FirstSlot),
    NearMiss("own_one_weight", BODIES, OneWeightForAllSlots),
    NearMiss("own_slots_of_other_rows", BODIES, SlotsOfOtherRows),
)
