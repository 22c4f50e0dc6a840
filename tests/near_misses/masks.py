"""Masks and lists of hit experts that say something other than `ids == e`, and mixtures without a hard choice."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import Loop, NearMiss, hits
from tests.zoo.common import D
from tests.zoo.masks import ComparedWithAll


class ShiftedMask(Loop):
    """Expert e serves id e + 1."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e + 1)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class ComparedWithOthers(ComparedWithAll):
    """Expert e serves id e + 1."""

    def numbers(self):
        return torch.arange(1, self.num_experts + 1)


class ComparedWithWritten(ComparedWithAll):
    """Two experts serve one id."""

    def numbers(self):
        numbers = torch.arange(self.num_experts)
        numbers[1] = 0
        return numbers


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
    NearMiss("range_shifted_mask", "every_expert_is_covered", ShiftedMask, may_rewrite=True),
    NearMiss("range_more_classes", "every_expert_is_covered", MoreClasses, may_rewrite=True),
    NearMiss("range_compared_with_others", "loop_has_a_known_form", ComparedWithOthers),
    NearMiss("range_compared_with_written", "loop_has_a_known_form", ComparedWithWritten),
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
    NearMiss("dense_soft_mixture", "weights_are_zero_outside_the_top_k", SoftMixture),
    NearMiss("dense_leaky", "weights_are_zero_outside_the_top_k", LeakyDense),
    NearMiss("dense_finite_mask", "weights_are_zero_outside_the_top_k", FiniteMask),
    NearMiss("range_expert_choice", "loop_has_a_known_form", ExpertChoice, may_rewrite=True),
)
