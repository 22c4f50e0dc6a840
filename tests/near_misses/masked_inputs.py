"""Every expert on masked rows, of which the mask isn't one of all the tokens that count, or changes them."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.masks import MaskLoop


class MaskedInputs(MaskLoop):
    """The plainest such loop, in steps of which a near miss replaces one."""

    def chosen(self, ids, weights, e):
        return (ids == e).any(-1, keepdim=True).to(weights.dtype)

    def weight(self, ids, weights, e):
        return (weights * (ids == e)).sum(-1, keepdim=True)

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x * self.chosen(ids, weights, e)) * self.weight(ids, weights, e)
        return out


class MaskedByTheNext(MaskedInputs):
    def chosen(self, ids, weights, e):
        return super().chosen(ids, weights, (e + 1) % self.num_experts)


class MaskedByOneSlot(MaskedInputs):
    """A token that has the expert as its second choice reads zeros."""

    def chosen(self, ids, weights, e):
        return (ids[:, 0] == e).unsqueeze(-1).to(weights.dtype)


class MaskedByRepeated(MaskedInputs):
    """A token that has the expert twice reads twice its row."""

    def route(self, x_TD):
        logits, ids, weights = super().route(x_TD)
        return logits, ids // 2, weights

    def chosen(self, ids, weights, e):
        return (ids == e).sum(-1, keepdim=True).to(weights.dtype)


class MaskWritten(MaskedInputs):
    """The first tokens are hidden from all experts."""

    def chosen(self, ids, weights, e):
        mask = super().chosen(ids, weights, e)
        mask[:4] = 0
        return mask


class MaskedFromTheEnd(MaskLoop):
    """The last expert's tokens have the id -1, which finds its rows, but not their mask."""

    def moe(self, x, ids, weights):
        ids = torch.where(ids == E - 1, -1, ids)
        rows = [expert(x * (ids == e).any(-1, keepdim=True)) for e, expert in enumerate(self.experts)]
        picked = torch.stack(rows, 1)[torch.arange(x.shape[0])[:, None], ids]
        return (picked * weights.unsqueeze(-1)).sum(1)


class WeightedTwice(MaskedByRepeated):
    """The number of slots, where a token may have the expert twice, beside their summed weights."""

    def weight(self, ids, weights, e):
        return super().weight(ids, weights, e) * (ids == e).sum(-1, keepdim=True)

    def chosen(self, ids, weights, e):
        return 1.0


class WeightedByOneHot(WeightedTwice):
    """The same, from the sum of a one-hot tensor."""

    def weight(self, ids, weights, e):
        counted = torch.nn.functional.one_hot(ids, E).sum(-2)
        return MaskedInputs.weight(self, ids, weights, e) * counted[:, e : e + 1]


class WeightedOnce(WeightedTwice):
    """Tokens that have the expert exactly once."""

    def weight(self, ids, weights, e):
        return MaskedInputs.weight(self, ids, weights, e) * ((ids == e).sum(-1, keepdim=True) == 1)


BODIES, REPEATED = "bodies_are_isomorphic", "repeated_ids_are_counted"

MISSES = (
    NearMiss("dense_masked_by_the_next", BODIES, MaskedByTheNext),
    NearMiss("dense_masked_by_one_slot", BODIES, MaskedByOneSlot),
    NearMiss("dense_masked_by_repeated", BODIES, MaskedByRepeated),
    NearMiss("dense_mask_written", "nothing_is_written_inside", MaskWritten),
    NearMiss("dense_masked_from_the_end", "every_expert_is_covered", MaskedFromTheEnd),
    NearMiss("dense_weighted_twice", REPEATED, WeightedTwice),
    NearMiss("dense_weighted_by_one_hot", REPEATED, WeightedByOneHot),
    NearMiss("dense_weighted_once", None, WeightedOnce),
)
