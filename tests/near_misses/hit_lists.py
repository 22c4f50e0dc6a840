"""Lists and sets of numbers that are not those of all experts with a token, or that tell more than that."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.hit_lists import BySlot, Enumerated, EnumeratedNumbers, Listed


class WithoutFirst(Listed):
    """The first expert of the list is left out."""

    def listed(self, ids):
        return ids.unique().tolist()[1:]


class AnotherFirst(Listed):
    """Numbers of ids that were changed: an expert works for those who chose the one after it."""

    def listed(self, ids):
        return ((ids + 1) % E).unique().tolist()


class Discarded(Listed):
    """One expert is taken out of the set."""

    def listed(self, ids):
        experts = set(ids.flatten().tolist())
        experts.discard(1)
        return experts


class OfOneToken(Listed):
    """The experts that the first token chose."""

    def listed(self, ids):
        return set(ids[0].tolist())


class WrittenIds(Listed):
    """Ids that were written to between the list and the set."""

    def listed(self, ids):
        moved = ids.flatten().clone()
        numbers = moved.tolist()
        moved.clamp_(max=E - 2)
        return set(moved.tolist()) & set(numbers)


class Repeated(Listed):
    """A list with a number for each slot."""

    def listed(self, ids):
        return ids.flatten().tolist()


class LeftEarly(Listed):
    """The loop ends behind the third expert."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in self.listed(ids):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
            if e == 2:
                break
        return out


class Counted(Listed):
    """How many experts were hit scales the output."""

    def moe(self, x, ids, weights):
        return super().moe(x, ids, weights) * len(self.listed(ids))


class LastNumber(Listed):
    """The last expert with a token scales the output."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        e = 0
        for e in self.listed(ids):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * (e + 1)


class OtherSlot(BySlot):
    """The experts that were hit in the first slot, and the tokens of both."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in ids[:, 0].unique().tolist():
            for k in range(self.top_k):
                m = ids[:, k] == e
                out[m] += self.experts[e](x[m]) * weights[m, k, None]
        return out


class ExpertByPlace(Enumerated):
    """The first expert with a token is taken for expert 0, and so on."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for i, e in enumerate(self.hit(ids)):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[i](x[tokens]) * weights[tokens, slots, None])
        return out


class ScaledByPlace(Enumerated):
    """Each expert with a token counts more than the one before it."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for i, e in enumerate(self.hit(ids)):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * (weights[tokens, slots, None] * (i + 1)))
        return out


class FirstPlaceSkipped(EnumeratedNumbers):
    """The first expert with a token is skipped."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for i, e in enumerate(self.hit(ids)):
            if i == 0:
                continue
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class LastPlace(Enumerated):
    """How many experts have a token scales the output."""

    def moe(self, x, ids, weights):
        out, i = torch.zeros_like(x), 0
        for i, e in enumerate(self.hit(ids)):  # noqa: B007
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * (i + 1)


OVER_HITS = "loop_is_over_the_hit_experts"
MISSES = (
    NearMiss("hit_list_without_first", OVER_HITS, WithoutFirst),
    NearMiss("hit_list_another_first", OVER_HITS, AnotherFirst),
    NearMiss("hit_list_discarded", OVER_HITS, Discarded),
    NearMiss("hit_list_of_one_token", "guards_are_of_the_same_expert", OfOneToken),
    NearMiss("hit_list_written_ids", "accumulator_may_be_added_to", WrittenIds),
    NearMiss("hit_list_repeated", OVER_HITS, Repeated),
    NearMiss("hit_list_left_early", "loop_runs_to_its_end", LeftEarly),
    NearMiss("hit_list_counted", "no_intermediate_escapes", Counted),
    NearMiss("hit_list_last_number", "loop_changes_no_python_state", LastNumber),
    NearMiss("hit_list_other_slot", "guards_are_of_the_same_expert", OtherSlot),
    NearMiss("hit_enumerated_by_place", OVER_HITS, ExpertByPlace),
    NearMiss("hit_enumerated_scaled_by_place", "operations_are_known", ScaledByPlace),
    NearMiss("hit_enumerated_without_first", "guards_only_skip_empty_experts", FirstPlaceSkipped),
    NearMiss("hit_enumerated_last_place", "loop_changes_no_python_state", LastPlace),
)
