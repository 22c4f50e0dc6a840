"""Ids that repeat, masks of other ids, weights and rows taken from elsewhere, hits that are not the hits."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import Loop, NearMiss, hits
from tests.zoo.common import TOKENS, D


class ClampedIds(Loop):
    """A clamp makes ids of a row equal; `+=` then loses one of them."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        ids = ids.clamp(max=self.num_experts - 3)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class ClampedIdsCounted(Loop):
    """The same ids under index_add_, which counts every one."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        ids = ids.clamp(max=self.num_experts - 3)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ModuloIds(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        ids = ids % 2
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class ModuloIdsHit(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        mask = F.one_hot(ids % 2, num_classes=self.num_experts).permute(2, 1, 0)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class HashRouted(Loop):
    """Ids from a table of the token's position: a row may name an expert twice."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(self.num_experts, (TOKENS, self.top_k)))

    def forward(self, hidden_states):
        x, _, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(self.table == e)
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class HashRoutedHit(HashRouted):
    def forward(self, hidden_states):
        x, _, weights, _, out = self.begin(hidden_states)
        mask = F.one_hot(self.table, num_classes=self.num_experts).permute(2, 1, 0)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class SumOfIds(Loop):
    """Arithmetic on ids: (i + j) % E is one id twice."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        ids = (ids + ids.flip(1)) % self.num_experts
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return out


class FirstWeight(Loop):
    """Every slot takes the first slot's weight."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            _, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, 0, None])
        return out


class FirstWeightHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            _, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, 0, None])
        return out


class OtherSlotWeight(Loop):
    """The weight of the token's other slot."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, 1 - slots, None])
        return out


class WeightByProbability(Loop):
    """The column of the softmax over all experts: the unnormalised weight, read from another table."""

    def forward(self, hidden_states):
        x, _, _, mask, out = self.begin(hidden_states)
        probs = self.gate(x).softmax(-1)
        for e in range(self.num_experts):
            _, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * probs[tokens, e, None])
        return out


class SwappedWhere(Loop):
    """slots and tokens change places for the rows of x."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[slots]) * weights[tokens, slots, None])
        return out


class ScatteredElsewhere(Loop):
    """Results go to the row before."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, (tokens + 1) % x.shape[0], y)
        return out


class ScatteredElsewhereHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            y = self.experts[e](x[tokens]) * weights[tokens, slots, None]
            out.index_add_(0, x.shape[0] - 1 - tokens, y)
        return out


class OtherRows(Loop):
    """Rows of a longer tensor at shifted places."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        longer = torch.cat((x * 2, x.flip(0)))
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](longer[tokens + x.shape[0]]) * weights[tokens, slots, None])
        return out


class OtherInput(Loop):
    """The experts read another tensor of as many rows: sound with that tensor as the input."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        other = x.flip(0) * 2
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](other[tokens]) * weights[tokens, slots, None])
        return out


class LongerInput(Loop):
    """The experts read the first rows of a longer tensor."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        longer = torch.cat((x.flip(0), x))
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](longer[tokens]) * weights[tokens, slots, None])
        return out


class LongerAccumulator(Loop):
    """The accumulator has twice the rows and is cut afterwards."""

    def forward(self, hidden_states):
        x, _, weights, mask, _ = self.begin(hidden_states)
        out = x.new_zeros(2 * x.shape[0], D)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out[: x.shape[0] + 1]


class SlotRows(Loop):
    """One row per slot in, one row per token out."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        repeated = torch.stack((x, x.flip(0)), dim=1)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](repeated[tokens, slots]) * weights[tokens, slots, None])
        return out


class ShiftedMask(Loop):
    """Expert e serves id e + 1."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e + 1)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class MoreClasses(Loop):
    """num_classes is larger than E."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        mask = F.one_hot(ids, num_classes=self.num_experts + 3).permute(2, 1, 0)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ThresholdMask(Loop):
    """Slots of small weight are dropped."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where((ids == e) & (weights > 0.4))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ThresholdMaskHit(Loop):
    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        mask = F.one_hot(ids, num_classes=self.num_experts) * (weights > 0.4).unsqueeze(-1)
        mask = mask.permute(2, 1, 0)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class WiderMask(Loop):
    """Every expert serves id 0 as well."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where((ids == e) | (ids == 0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class InequalityMask(Loop):
    """Expert e serves ids up to e."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids <= e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class Capacity(Loop):
    """The first eight tokens of every expert."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            slots, tokens = slots[:8], tokens[:8]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class CapacityHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            slots, tokens = slots[:8], tokens[:8]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class FlippedTokens(Loop):
    """Tokens in reverse, slots not: weights of other tokens."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens.flip(0)]) * weights[tokens, slots, None]
            out.index_add_(0, tokens, y)
        return out


class HitsOfTopOne(Loop):
    """Only experts that are somebody's first choice are visited, with all their tokens."""

    def __init__(self):
        super().__init__(num_experts=6)

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states[:, :3])
        for e in torch.greater(mask[:, 0].sum(dim=-1), 0).nonzero():
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class HitsOfOtherIds(Loop):
    """Hits of one mask, bodies of another."""

    def __init__(self):
        super().__init__(num_experts=6)
        self.other = nn.Linear(D, self.num_experts, bias=False)

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states[:, :3])
        ids = self.other(x).topk(1, dim=-1).indices
        others = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in hits(others):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class HitsReversed(Loop):
    """Another order of the same sum."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask).flip(0):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class HitsWithoutFirst(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask)[1:]:
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class HitsTwice(Loop):
    """Every hit expert is visited twice."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        hit = hits(mask)
        for e in torch.cat((hit, hit)):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class BusyExperts(Loop):
    """Only experts with more than eleven tokens."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 11).nonzero():
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class IdleExperts(Loop):
    """The experts which were not hit see all tokens."""

    def forward(self, hidden_states):
        x, _, _, mask, out = self.begin(hidden_states[:, :1])
        for e in torch.eq(mask.sum(dim=(-1, -2)), 0).nonzero():
            out = out + self.experts[e](x)
        return out


class NextExpert(Loop):
    """Expert e + 1 of a hit loop serves the tokens of e."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            expert = self.experts[(e + 1) % self.num_experts]
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class WeightTwice(Loop):
    """The router's weight before and after the expert."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            weight = weights[tokens, slots, None]
            out.index_add_(0, tokens, self.experts[e](x[tokens] * weight) * weight)
        return out


class WeightTwiceHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            weight = weights[tokens, slots, None]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weight * weight)
        return out


class WeightNormalizedByExpert(Loop):
    """Weights divided by their sum over the expert's tokens."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            weight = weights[tokens, slots, None]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weight / (1 + weight.sum()))
        return out


class SoftmaxOverTokens(Loop):
    """A strange router, an honest loop."""

    def forward(self, hidden_states):
        x, _, _, _, out = self.begin(hidden_states)
        weights, ids = self.gate(x).softmax(dim=0).topk(self.top_k, dim=-1)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class SoftMixture(Loop):
    """Every expert on every token with a weight that is never zero."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        probs = self.gate(x).softmax(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + probs[:, e, None] * expert(x)
        return out


class LeakyDense(Loop):
    """The top-k scattered into a table of small weights instead of zeros."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        table = torch.full((x.shape[0], self.num_experts), 0.01).scatter(1, ids, weights)
        for e, expert in enumerate(self.experts):
            out = out + table[:, e, None] * expert(x)
        return out


class FiniteMask(Loop):
    """Logits outside the top-k lowered by three, not by infinity."""

    def forward(self, hidden_states):
        x, ids, _, _, out = self.begin(hidden_states)
        logits = self.gate(x)
        table = (logits - 3).scatter(1, ids, logits.gather(1, ids)).softmax(dim=-1)
        for e, expert in enumerate(self.experts):
            out = out + table[:, e, None] * expert(x)
        return out


class ExpertChoice(Loop):
    """Experts choose tokens."""

    def forward(self, hidden_states):
        x, _, _, _, out = self.begin(hidden_states)
        weights, chosen = self.gate(x).softmax(dim=-1).t().topk(8, dim=-1)
        for e in range(self.num_experts):
            tokens = chosen[e]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[e, :, None])
        return out


MISSES = (
    NearMiss("range_clamped_ids", "repeated_ids_are_counted", ClampedIds),
    NearMiss("range_clamped_ids_counted", "repeated_ids_are_counted", ClampedIdsCounted, may_rewrite=True),
    NearMiss("range_modulo_ids", "repeated_ids_are_counted", ModuloIds),
    NearMiss("hit_modulo_ids", "repeated_ids_are_counted", ModuloIdsHit),
    NearMiss("range_hash_routed", "repeated_ids_are_counted", HashRouted),
    NearMiss("hit_hash_routed", "repeated_ids_are_counted", HashRoutedHit),
    NearMiss("range_sum_of_ids", "repeated_ids_are_counted", SumOfIds),
    NearMiss("range_first_weight", "bodies_are_isomorphic", FirstWeight, may_rewrite=True),
    NearMiss("hit_first_weight", "bodies_are_isomorphic", FirstWeightHit, may_rewrite=True),
    NearMiss("hit_other_slot_weight", "bodies_are_isomorphic", OtherSlotWeight),
    NearMiss("range_weight_by_probability", "bodies_are_isomorphic", WeightByProbability, may_rewrite=True),
    NearMiss("range_swapped_where", "bodies_are_isomorphic", SwappedWhere),
    NearMiss("range_scattered_elsewhere", "loop_has_a_known_form", ScatteredElsewhere),
    NearMiss("hit_scattered_elsewhere", "loop_has_a_known_form", ScatteredElsewhereHit),
    NearMiss("range_other_rows", "bodies_are_isomorphic", OtherRows),
    NearMiss("range_other_input", "rows_belong_to_tokens", OtherInput, may_rewrite=True),
    NearMiss("hit_longer_input", "rows_belong_to_tokens", LongerInput, may_rewrite=True),
    NearMiss("range_longer_accumulator", "rows_belong_to_tokens", LongerAccumulator, may_rewrite=True),
    NearMiss("range_slot_rows", "rows_belong_to_tokens", SlotRows, may_rewrite=True),
    NearMiss("range_shifted_mask", "every_expert_is_covered", ShiftedMask),
    NearMiss("range_more_classes", "every_expert_is_covered", MoreClasses, may_rewrite=True),
    NearMiss("range_threshold_mask", "loop_has_a_known_form", ThresholdMask),
    NearMiss("hit_threshold_mask", "loop_is_over_the_hit_experts", ThresholdMaskHit),
    NearMiss("range_wider_mask", "loop_has_a_known_form", WiderMask),
    NearMiss("range_inequality_mask", "loop_has_a_known_form", InequalityMask),
    NearMiss("range_capacity", "loop_has_a_known_form", Capacity),
    NearMiss("hit_capacity", "loop_has_a_known_form", CapacityHit),
    NearMiss("range_flipped_tokens", "bodies_are_isomorphic", FlippedTokens),
    NearMiss("hit_hits_of_top_one", "loop_is_over_the_hit_experts", HitsOfTopOne),
    NearMiss("hit_hits_of_other_ids", "guards_are_of_the_same_expert", HitsOfOtherIds),
    NearMiss("hit_reversed", "loop_has_a_known_form", HitsReversed, may_rewrite=True),
    NearMiss("hit_without_first", "loop_is_over_the_hit_experts", HitsWithoutFirst),
    NearMiss("hit_twice", "loop_is_over_the_hit_experts", HitsTwice),
    NearMiss("hit_busy_experts", "loop_is_over_the_hit_experts", BusyExperts),
    NearMiss("hit_idle_experts", "loop_is_over_the_hit_experts", IdleExperts),
    NearMiss("hit_next_expert", "loop_can_be_traced", NextExpert),
    NearMiss("range_weight_twice", "bodies_are_isomorphic", WeightTwice, may_rewrite=True),
    NearMiss("hit_weight_twice", "loop_has_a_known_form", WeightTwiceHit, may_rewrite=True),
    NearMiss("range_weight_normalized_by_expert", "body_is_row_wise", WeightNormalizedByExpert),
    NearMiss("range_softmax_over_tokens_router", "bodies_are_isomorphic", SoftmaxOverTokens, may_rewrite=True),
    NearMiss("dense_soft_mixture", None, SoftMixture),
    NearMiss("dense_leaky", None, LeakyDense),
    NearMiss("dense_finite_mask", None, FiniteMask),
    NearMiss("range_expert_choice", "loop_has_a_known_form", ExpertChoice, may_rewrite=True),
)
