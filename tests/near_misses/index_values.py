"""Indices that keep a shape or an order by accident: permutations, negative numbers, counts of some experts alone."""

import torch

from tests.near_misses.common import NearMiss
from tests.near_misses.flat import FlatLoop
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class FlatWeightsTurned(FlatLoop):
    """The index that adds a dim to the router weights gives each slot that of the other."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids).view(*ids.shape, D)
        return (y * weights[:, [1, 0], None]).sum(dim=1)


class FlatWeightsOfOtherTokens(FlatLoop):
    """The same with the rows of the router weights."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids).view(*ids.shape, D)
        return (y * weights[torch.arange(len(x)).roll(1), :, None]).sum(dim=1)


class OutputsFromTheEnd(MaskLoop):
    """Ids from -1 on: outputs that are indexed by them count experts from the end."""

    def moe(self, x, ids, weights):
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = outputs[torch.arange(len(x))[:, None], ids - 1]
        return torch.einsum("tkd,tk->td", chosen, weights)


class ColumnFromTheEnd(MaskLoop):
    """Expert -1 is that of id -1, and its weights are the last column of a table."""

    def moe(self, x, ids, weights):
        table = torch.zeros(len(x), self.num_experts).scatter(1, ids, weights)
        before, out = ids - 1, torch.zeros_like(x)
        for e in range(-1, self.num_experts - 1):
            tokens, _ = torch.where(before == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * table[tokens, e, None])
        return out


class HitsOfLongerCounts(MaskLoop):
    """`bincount` gives more counts than were asked for: experts beyond are hit as well."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in (ids.flatten().bincount(minlength=2) > 0).nonzero().flatten():
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class HitsOfChangedIds(MaskLoop):
    """The same of ids that were computed with, of which nobody knows how large they are."""

    def moe(self, x, ids, weights):
        ids, out = ids * 2 % 5, torch.zeros_like(x)
        for e in (ids.flatten().bincount(minlength=2) > 0).nonzero().flatten().tolist():
            tokens, slots = torch.where(ids == e)
            expert = self.experts[e % self.num_experts]
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


SUMMED, OVER_HITS = "slots_of_a_token_are_summed", "loop_is_over_the_hit_experts"
MISSES = (
    NearMiss("flat_weights_turned", SUMMED, FlatWeightsTurned),
    NearMiss("flat_weights_of_other_tokens", SUMMED, FlatWeightsOfOtherTokens),
    NearMiss("stack_outputs_from_the_end", SUMMED, OutputsFromTheEnd, may_rewrite=True),
    NearMiss("range_column_from_the_end", "bodies_are_isomorphic", ColumnFromTheEnd),
    NearMiss("hits_of_longer_counts", OVER_HITS, HitsOfLongerCounts),
    NearMiss("hits_of_changed_ids", OVER_HITS, HitsOfChangedIds),
)
