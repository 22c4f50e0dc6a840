"""Slots that are sorted by expert at once: one step of the recipe is another one."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import FF, D, E, K
from tests.zoo.sorted_slots import ParallelExperts, SortedBlock, SortedExperts, UnderAutocast, grouped_mm


class OffsetsOfOtherIds(SortedExperts):
    """Counts are taken from the sorted first choices of all tokens, each twice."""

    def forward(self, x, ids, weights):
        experts, order = self.sort(ids)
        others, _ = self.sort(ids[:, :1].expand(-1, K))
        rows = self.weigh(self.rows(x, order, experts, self.offsets(others)), weights, order)
        return self.add_up(self.put_back(rows, order), x.size(0))


class WrongMaximum(SortedExperts):
    """Bins of another width: the last two experts share one."""

    def offsets(self, experts):
        counts = torch.histc(experts.float(), bins=E, min=0, max=E)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)


class ShiftedOffsets(SortedExperts):
    """The last row of every expert goes to the next."""

    def offsets(self, experts):
        offsets = super().offsets(experts)
        offsets.sub_(1).clamp_(min=0)
        return offsets


class SumOverTokens(SortedExperts):
    """As many tokens as slots of a token: the sum is over the wrong dim."""

    def add_up(self, rows, tokens):
        return rows.view(K, tokens, D).sum(dim=0)


class WeightsInAnotherOrder(SortedExperts):
    """The weights are taken by the order of the weights."""

    def weigh(self, rows, weights, order):
        other = torch.argsort(weights.reshape(-1))
        return rows * weights.reshape(-1)[other].unsqueeze(-1)


class WeightsAsTheyCome(SortedExperts):
    """Rows are sorted, their weights are not."""

    def weigh(self, rows, weights, order):
        return rows * weights.reshape(-1).unsqueeze(-1)


class SortedTwice(SortedExperts):
    """Rows that are sorted already are taken in sorted order once more."""

    def weigh(self, rows, weights, order):
        return super().weigh(rows[order], weights, order)


class OtherTokens(SortedExperts):
    """Slots are numbered token by token, tokens are read as if choice by choice."""

    def rows(self, x, order, experts, offsets):
        return super().rows(x, (order * 2) % order.size(0), experts, offsets)


class RowsReturned(SortedExperts):
    """Each expert's rows are seen outside."""

    def forward(self, x, ids, weights):
        experts, order = self.sort(ids)
        rows = self.rows(x, order, experts, self.offsets(experts))
        return self.add_up(self.put_back(self.weigh(rows, weights, order), order), x.size(0)), rows


class CountsReturned(SortedExperts):
    """How many rows each expert has is seen outside."""

    def forward(self, x, ids, weights):
        experts, order = self.sort(ids)
        offsets = self.offsets(experts)
        rows = self.weigh(self.rows(x, order, experts, offsets), weights, order)
        return self.add_up(self.put_back(rows, order), x.size(0)), offsets


class MoreExperts(SortedExperts):
    """Weights of E + 2 experts, of which the first E are used, through offsets of E + 2."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E + 2, 2 * FF, D))

    def rows(self, x, order, experts, offsets):
        counts = torch.histc(experts.float(), bins=E + 2, min=0, max=E + 1)
        more = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate, up = grouped_mm(x[order // K], self.gate_up_proj.transpose(-2, -1), more).chunk(2, dim=-1)
        return grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offsets)


class MeanOverRows(SortedExperts):
    """Rows are centred by the mean over all rows."""

    def weigh(self, rows, weights, order):
        return super().weigh(rows - rows.mean(dim=0, keepdim=True), weights, order)


class MixedRows(SortedExperts):
    """Each row is multiplied by the scales of every row's expert."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(E, D, D))

    def weigh(self, rows, weights, order):
        return super().weigh(torch.matmul(rows, self.mix[order % E]).mean(dim=0), weights, order)


class WrittenAfterRead(SortedExperts):
    """What one reader saw is changed before the next reads it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(E, 2 * FF))

    def rows(self, x, order, experts, offsets):
        h = grouped_mm(x[order // K], self.gate_up_proj.transpose(-2, -1), offsets)
        gate = h[:, :FF] * 1.0
        h.add_(self.bias[experts])
        return grouped_mm(F.silu(gate) * h[:, FF:], self.down_proj.transpose(-2, -1), offsets)


class ClampedBeforeCounting(ParallelExperts):
    """Ids of other ranks count as those of the last expert."""

    def offsets(self, experts):
        experts.clamp_(max=E - 1)
        return super().offsets(experts)


class SentinelsAddUp(ParallelExperts):
    """Rows of other ranks' experts are one, not zero."""

    def rows(self, x, order, experts, offsets):
        return super().rows(x, order, experts, offsets) + 1

    def weigh(self, rows, weights, order):
        return super().weigh(rows, weights + 1, order)


class Pair(SortedBlock):
    """The experts return two tensors."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        return self.experts(x, *self.route(x))


class SharedProduct(UnderAutocast):
    """Autocast reaches a product that all experts share."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.empty(D, D))

    def weigh(self, rows, weights, order):
        return super().weigh(F.linear(rows, self.shared), weights, order)


class RoundedRows(UnderAutocast):
    """Rows are rounded between two products."""

    def rows(self, x, order, experts, offsets):
        h = grouped_mm(x[order // K], self.gate_up_proj.transpose(-2, -1), offsets)[:, :FF]
        return grouped_mm(F.silu(h.bfloat16()).float(), self.down_proj.transpose(-2, -1), offsets)


class NormUnderAutocast(UnderAutocast):
    """Autocast has an opinion on norms."""

    def weigh(self, rows, weights, order):
        return super().weigh(F.layer_norm(rows, (D,)), weights, order)


def block(experts, **kwargs):
    return lambda: SortedBlock(experts, **kwargs)


MISSES = (
    NearMiss("slots_other_offsets", "offsets_are_those_of_the_rows", block(OffsetsOfOtherIds)),
    NearMiss("slots_wrong_maximum", "offsets_are_those_of_the_rows", block(WrongMaximum)),
    NearMiss("slots_shifted_offsets", "no_intermediate_escapes", block(ShiftedOffsets)),
    NearMiss("slots_wrong_sum", "slots_of_a_token_are_summed", block(SumOverTokens)),
    NearMiss("slots_weights_in_another_order", "body_is_row_wise", block(WeightsInAnotherOrder)),
    NearMiss("slots_weights_as_they_come", "body_is_row_wise", block(WeightsAsTheyCome)),
    NearMiss("slots_sorted_twice", "rows_are_taken_in_one_order", block(SortedTwice)),
    NearMiss("slots_other_tokens", "body_is_row_wise", block(OtherTokens)),
    NearMiss("slots_rows_returned", "no_intermediate_escapes", lambda: Pair(RowsReturned)),
    NearMiss("slots_counts_returned", "no_intermediate_escapes", lambda: Pair(CountsReturned)),
    NearMiss("slots_more_experts", "every_expert_is_covered", block(MoreExperts)),
    NearMiss("slots_mean_over_rows", "body_is_row_wise", block(MeanOverRows)),
    NearMiss("slots_mixed_rows", "body_is_row_wise", block(MixedRows)),
    NearMiss("slots_shared_product_under_autocast", "products_keep_their_dtype", block(SharedProduct)),
    NearMiss("slots_rounded_under_autocast", "products_keep_their_dtype", block(RoundedRows)),
    NearMiss("slots_norm_under_autocast", "products_keep_their_dtype", block(NormUnderAutocast)),
    NearMiss("slots_written_after_read", "nothing_is_written_inside", block(WrittenAfterRead)),
    NearMiss("slots_clamped_first", "nothing_is_written_inside", block(ClampedBeforeCounting, elsewhere=2)),
    NearMiss("slots_sentinels_add_up", "rows_of_nobody_are_zero", block(SentinelsAddUp, elsewhere=2)),
)
