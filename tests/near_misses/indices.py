"""Rows, slots and router weights that are not those of the expert's tokens."""

import torch
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


class MadeEqualThenCopied(Loop):
    """Ids that were made equal in place, and a copy of them."""

    def forward(self, hidden_states):
        x, _, weights, _, out = self.begin(hidden_states)
        ids = self.gate(x).detach().topk(self.top_k, dim=-1).indices
        ids[:, 1] = ids[:, 0]
        ids = ids.clone()
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out[tokens] += self.experts[e](x[tokens]) * weights[tokens, slots, None]
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


MISSES = (
    NearMiss("range_clamped_ids", "repeated_ids_are_counted", ClampedIds),
    NearMiss("range_clamped_ids_counted", "repeated_ids_are_counted", ClampedIdsCounted, may_rewrite=True),
    NearMiss("range_made_equal_then_copied", "repeated_ids_are_counted", MadeEqualThenCopied),
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
    NearMiss("range_weight_twice", "bodies_are_isomorphic", WeightTwice, may_rewrite=True),
    NearMiss("hit_weight_twice", "loop_has_a_known_form", WeightTwiceHit, may_rewrite=True),
    NearMiss("range_weight_normalized_by_expert", "body_is_row_wise", WeightNormalizedByExpert),
    NearMiss("range_softmax_over_tokens_router", "bodies_are_isomorphic", SoftmaxOverTokens, may_rewrite=True),
)
