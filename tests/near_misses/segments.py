"""Segments of rows that lie expert by expert: other segments, other orders, lists that are asked for more."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D
from tests.zoo.segments import ArrayBlock, SegmentBlock, SkippingBlock, SlicedBlock
from tests.zoo.segments_of_slots import IndexBlock, InferenceBlock


class Reversed(SegmentBlock):
    """The experts' rows are put together in another order."""

    def parts(self, rows, counts):
        return super().parts(rows, counts)[::-1]


class Shifted(SlicedBlock):
    """Each segment begins and ends one row too late."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.tolist()):
            outputs.append(self.experts[e](rows[start + 1 : start + count + 1]))
            start += count
        return [*outputs, rows[:1]]


class OfFirstSlot(SlicedBlock):
    """The first slots are counted, and all rows are cut."""

    def counts(self, ids):
        return torch.bincount(ids[:, 0], minlength=self.num_experts)

    def combine(self, grouped, x, order, weights):
        return x + grouped.sum(0)


class CountsChanged(SlicedBlock):
    """The counts change in place before they are read."""

    def counts(self, ids):
        counts = super().counts(ids)
        counts[0] += counts[1]
        counts[1] = 0
        return counts


class RowsWritten(SlicedBlock):
    """The rows change between the experts."""

    @torch.no_grad()
    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.tolist()):
            outputs.append(self.experts[e](rows[start : start + count]))
            rows.mul_(0.5)
            start += count
        return outputs


class Tied(SegmentBlock):
    """Two experts share a parameter."""

    def __init__(self):
        super().__init__()
        self.experts[1].w2 = self.experts[0].w2


class MixedRows(SegmentBlock):
    """An expert's rows are centred by their mean."""

    def parts(self, rows, counts):
        return [part - part.mean(0, keepdim=True) for part in super().parts(rows, counts)]


class ScaledByCount(SegmentBlock):
    """An expert's rows are divided by their number."""

    def parts(self, rows, counts):
        return [part / (part.shape[0] + 1) for part in super().parts(rows, counts)]


class OneMore(SegmentBlock):
    """The first expert's rows are used apart, too."""

    def parts(self, rows, counts):
        parts = super().parts(rows, counts)
        self.extra = parts[0].sum(0)
        return parts

    def combine(self, grouped, x, order, weights):
        out = super().combine(grouped, x, order, weights) + self.extra
        self.extra = None
        return out


class OneScaled(SegmentBlock):
    """The last expert's rows are doubled."""

    def parts(self, rows, counts):
        parts = super().parts(rows, counts)
        return [*parts[:-1], parts[-1] * 2]


class SkipsSingles(SkippingBlock):
    """An expert with one token is skipped, too."""

    def skips(self, count):
        return count <= 1


class CountsExperts(SkippingBlock):
    """The output is divided by the number of experts with a token."""

    def parts(self, rows, counts):
        parts = super().parts(rows, counts)
        self.used = len(parts)
        return parts

    def combine(self, grouped, x, order, weights):
        return super().combine(grouped, x, order, weights) / self.used


class ReadsLast(SkippingBlock):
    """What the last expert with a token computes is used apart."""

    def parts(self, rows, counts):
        parts = super().parts(rows, counts)
        parts[-1] = parts[-1] * 2
        return parts


class CountsHit(CountsExperts):
    """The same number, counted one by one."""

    def parts(self, rows, counts):
        outputs, start, used = [], 0, 0
        for e, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start, used = start + count, used + 1
        self.used = used
        return outputs


class StartsLate(SkippingBlock):
    """An expert that is not skipped moves the start by more than its rows."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start = start + count + (e == 2)
        return [*outputs, rows[-1:]]


class Descending(IndexBlock):
    """The last expert's slots come first, and the first expert's are cut first."""

    def sort(self, ids):
        return ids.argsort(descending=True)


class WeightsUnsorted(IndexBlock):
    """The weights are cut as the slots come, not as they were sorted."""

    def cut(self, weights, order, start, end):
        return weights[start:end]


class WeightsOfAnotherSort(IndexBlock):
    """The weights are sorted by another sort, which may order equal ids in another way."""

    def cut(self, weights, order, start, end):
        return weights[self.other[start:end]]

    def sort(self, ids):
        self.other = ids.argsort()
        return ids.argsort(stable=True)

    def forward(self, hidden_states):
        out = super().forward(hidden_states)
        self.other = None
        return out


class LargestKept(InferenceBlock):
    """The largest of a token's values is kept, not their sum."""

    def add(self, out, tokens, y):
        out.scatter_reduce_(0, tokens.view(-1, 1).repeat(1, D), y, reduce="amax")


class HalfAdded(InferenceBlock):
    """Half of each row is added."""

    def add(self, out, tokens, y):
        out.scatter_add_(0, tokens.view(-1, 1).expand(-1, D // 2), y)


class TokensReversed(IndexBlock):
    """An expert's rows go to its tokens in reverse."""

    def add(self, out, tokens, y):
        out.scatter_add_(0, tokens.view(-1, 1).flip(0).expand(-1, D), y)


class LastExpertSeen(IndexBlock):
    """The number of the last expert that occurs is used."""

    def moe(self, x, ids, weights):
        out, order = torch.zeros_like(x), ids.argsort()
        ends, last = ids.bincount().cpu().numpy().cumsum(0), 0
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            own = order[start:end] // self.top_k
            out.index_add_(0, own, self.experts[e](x[own]) * weights[order[start:end]])
            last = e
        return out * (last + 1)


class CountsChangedAfter(IndexBlock):
    """The ids change once they were counted, and before they are sorted."""

    def ends(self, ids):
        ends = super().ends(ids)
        ids.copy_(ids.flip(0))
        return ends

    def moe(self, x, ids, weights):
        return super().moe(x, ids.clone(), weights)


class AddedTwice(SkippingBlock):
    """Twice the rows are added."""

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // self.top_k, y, alpha=2)


class AddedInAnotherOrder(SkippingBlock):
    """The rows are added to the tokens of slots in reverse."""

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order.flip(0) // self.top_k, y)


class AddedToSlots(SkippingBlock):
    """The slot itself, not its token, is where a row is added."""

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(grouped).index_add(0, order, y)[: x.shape[0]]


class PutBackHalf(ArrayBlock):
    """Rows are put back into places of every other slot's."""

    def combine(self, grouped, x, order, weights):
        slots = torch.zeros_like(grouped)
        slots[order // 2] = grouped.detach()
        return super().combine(slots + grouped, x, order, weights)


class Averaged(ArrayBlock):
    """The slots of a token are averaged."""

    def combine(self, grouped, x, order, weights):
        slots = torch.empty_like(grouped)
        slots[order] = grouped
        return (slots.view(*weights.shape, -1) * weights.unsqueeze(-1)).mean(1)


class WeightsShifted(SkippingBlock):
    """Each row is weighted as the one after it."""

    def combine(self, grouped, x, order, weights):
        y = grouped * weights.view(-1)[order].roll(1).unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // self.top_k, y)


class OrderShown(SkippingBlock):
    """The order of the slots is part of what the block returns."""

    def combine(self, grouped, x, order, weights):
        return super().combine(grouped, x, order, weights) + order.float().mean()


FORM, STATE = "loop_has_a_known_form", "loop_changes_no_python_state"

MISSES = (
    NearMiss("segments_reversed", FORM, Reversed),
    NearMiss("segments_shifted", FORM, Shifted),
    NearMiss("segments_of_first_slot", FORM, OfFirstSlot),
    NearMiss("segments_of_changed_counts", "nothing_is_written_inside", CountsChanged),
    NearMiss("segments_of_written_rows", "nothing_is_written_inside", RowsWritten),
    NearMiss("segments_tied", "bodies_are_isomorphic", Tied),
    NearMiss("segments_with_mixed_rows", "body_is_row_wise", MixedRows),
    NearMiss("segments_scaled_by_count", "bodies_are_isomorphic", ScaledByCount),
    NearMiss("segments_used_twice", "no_intermediate_escapes", OneMore),
    NearMiss("segments_one_scaled", "bodies_are_isomorphic", OneScaled),
    NearMiss("segments_skip_singles", "guards_only_skip_empty_experts", SkipsSingles),
    NearMiss("segments_count_experts", "no_intermediate_escapes", CountsExperts),
    NearMiss("segments_read_last", "parts_are_only_put_together", ReadsLast),
    NearMiss("segments_count_hit", STATE, CountsHit),
    NearMiss("segments_start_late", STATE, StartsLate),
    NearMiss("segments_added_twice", None, AddedTwice, may_rewrite=True),
    NearMiss("segments_added_in_another_order", None, AddedInAnotherOrder, may_rewrite=True),
    NearMiss("segments_added_to_slots", None, AddedToSlots, may_rewrite=True),
    NearMiss("segments_put_back_half", None, PutBackHalf, may_rewrite=True),
    NearMiss("segments_averaged", None, Averaged, may_rewrite=True),
    NearMiss("segments_weights_shifted", None, WeightsShifted, may_rewrite=True),
    NearMiss("segments_order_shown", None, OrderShown, may_rewrite=True),
    NearMiss("segments_of_slots_descending", FORM, Descending),
    NearMiss("segments_of_slots_weights_unsorted", "operations_are_known", WeightsUnsorted),
    NearMiss("segments_of_slots_weights_of_another_sort", "operations_are_known", WeightsOfAnotherSort),
    NearMiss("segments_of_slots_largest", "accumulation_is_a_plain_sum", LargestKept),
    NearMiss("segments_of_slots_half", "accumulation_is_a_plain_sum", HalfAdded),
    NearMiss("segments_of_slots_reversed", FORM, TokensReversed),
    NearMiss("segments_of_slots_last", STATE, LastExpertSeen),
    NearMiss("segments_of_slots_changed", "guards_only_skip_empty_experts", CountsChangedAfter),
)
