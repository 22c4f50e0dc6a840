"""Python numbers of tokens by expert: of other ids, of other experts, used as values.

Where the numbers are left to Dynamo, it breaks the graph there and compiles the rest for the numbers that it met. Then
the loop may be rewritten after all.
"""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.masks import MaskLoop


class CountedLoop(MaskLoop):
    """A loop that skips an expert by its count; a near miss changes one of its steps."""

    def moe(self, x, ids, weights):
        counts = self.count(ids)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            if self.skips(counts, e):
                continue
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out

    def count(self, ids):
        return torch.bincount(ids.view(-1), minlength=self.num_experts).tolist()

    def skips(self, counts, e):
        return counts[e] == 0


class CountOfNext(CountedLoop):
    """An expert is skipped where the next one has no token."""

    def skips(self, counts, e):
        return counts[(e + 1) % self.num_experts] == 0


class CountOfFirstSlot(CountedLoop):
    """Only the first slots are counted."""

    def count(self, ids):
        return torch.bincount(ids[:, 0], minlength=self.num_experts).tolist()


class CountOfFewer(CountedLoop):
    """Experts with one token are skipped, too."""

    def skips(self, counts, e):
        return counts[e] <= 1


class CountOfClampedIds(CountedLoop):
    """Ids from nowhere: as many counts as the largest id asks for."""

    def moe(self, x, ids, weights):
        return super().moe(x, (ids * 2) // 2, weights)


class CountAsWeight(MaskLoop):
    """The number of an expert's tokens divides its rows."""

    def moe(self, x, ids, weights):
        counts = torch.bincount(ids.view(-1), minlength=self.num_experts).tolist()
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            y = self.experts[e](x[tokens]) / (counts[e] + 1)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class CountReturned(CountedLoop):
    """The output is scaled by the first expert's number of tokens."""

    def moe(self, x, ids, weights):
        self.seen = None
        return super().moe(x, ids, weights) * self.seen

    def count(self, ids):
        counts = super().count(ids)
        self.seen = counts[0] + 1
        return counts


class CountBeforeChange(CountedLoop):
    """The ids change in place after they were counted."""

    def moe(self, x, ids, weights):
        return super().moe(x, ids.clone(), weights)  # backward of the router's topk reads its ids

    def count(self, ids):
        counts = super().count(ids)
        ids.add_(1).remainder_(self.num_experts)
        return counts


class CountWithoutMinimum(CountedLoop):
    """As many counts as the largest id that occurs asks for."""

    def count(self, ids):
        counts = torch.bincount(ids.view(-1)).tolist()
        return counts + [0] * (self.num_experts - len(counts))


FORM, GUARD = "loop_has_a_known_form", "guards_are_of_the_same_expert"

MISSES = (
    NearMiss("counts_of_next", GUARD, CountOfNext, may_rewrite=True),
    NearMiss("counts_of_first_slot", GUARD, CountOfFirstSlot, may_rewrite=True),
    NearMiss("counts_of_fewer", "guards_only_skip_empty_experts", CountOfFewer, may_rewrite=True),
    NearMiss("counts_of_any_ids", "ids_are_in_range", CountOfClampedIds, may_rewrite=True),
    NearMiss("counts_as_weight", "bodies_are_isomorphic", CountAsWeight),
    NearMiss("counts_returned", "no_intermediate_escapes", CountReturned, may_rewrite=True),
    NearMiss("counts_before_change", "nothing_is_written_inside", CountBeforeChange, may_rewrite=True),
    NearMiss("counts_without_minimum", FORM, CountWithoutMinimum, may_rewrite=True),
)
