"""Segments between tensors, and segments that are written: other bounds, other rows, tensors that others see."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.segments import SlicedBlock, TensorBlock, WrittenBlock
from tests.zoo.segments_of_slots import IndexBlock, SearchedBlock


class TensorsShifted(TensorBlock):
    """Each segment begins and ends one row too late."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts):
            outputs.append(self.experts[e](rows[start + 1 : start + count + 1]))
            start = start + count
        return [*outputs, rows[:1]]


class TensorsChanged(TensorBlock):
    """The counts change in place before the segments are cut."""

    def counts(self, ids):
        counts = super().counts(ids)
        counts[0] += counts[1]
        counts[1] = 0
        return counts


class TensorsChangedAndCopied(TensorsChanged):
    """The same of a copy."""

    def counts(self, ids):
        return super().counts(ids).clone()


class StartWritten(TensorBlock):
    """Where a segment begins is multiplied in place."""

    def parts(self, rows, counts):
        outputs, start = [], counts[0] - counts[0]
        for e, count in enumerate(counts):
            start.mul_(1)
            outputs.append(self.experts[e](rows[start : start + count]))
            start = start + count
        return outputs


class TensorsSkipSingles(TensorBlock):
    """An expert with one token is skipped, too."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts):
            if count <= 1:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start = start + count
        return outputs


class SkippedByNeighbour(TensorBlock):
    """An expert is skipped where the next one has no token."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts):
            if counts[(e + 1) % E] == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start = start + count
        return outputs


class StartShown(TensorBlock):
    """Where the last segment ended is part of the output."""

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(counts):
            if count == 0:
                continue
            outputs.append(self.experts[e](rows[start : start + count]))
            start = start + count
        return [part * start for part in outputs]


class StartsOutOfTurn(IndexBlock):
    """Experts come in another order: each says where the next one's slots begin, and may be skipped."""

    def counts(self, ids):
        return ids.bincount(minlength=E).tolist()

    def moe(self, x, ids, weights):
        out, order, counts = torch.zeros_like(x), ids.argsort(), self.counts(ids)
        start = counts[0] + 0
        for e in (1, 0, 2, 3):
            if counts[e] == 0:
                continue
            own = order[start : start + counts[e]]
            tokens = own // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[own])
            if e == 1:
                start = counts[0] - counts[0]
            if e == 0:
                start = counts[0] + counts[1]
            if e == 2:
                start = counts[0] + counts[1] + counts[2]
        return out


class TensorStartsOutOfTurn(StartsOutOfTurn):
    """The same with tensors."""

    def counts(self, ids):
        return ids.bincount(minlength=E)


class BoundsFromOne(WrittenBlock):
    """The first segment begins at the second row."""

    def bounds(self, counts):
        return torch.cat((torch.ones(1, dtype=torch.long), counts.cumsum(0))).clamp(max=counts.sum())


class BoundsSwapped(WrittenBlock):
    """Experts have each other's segments."""

    def product(self, rows, weight, counts):
        return super().product(rows, weight.flip(0), counts.flip(0))


class WrittenTwice(WrittenBlock):
    """The rows are written once more, doubled."""

    def write(self, out, start, end, y):
        out[start:end] = y
        out[start:end] = y * 2


class WrittenInPart(WrittenBlock):
    """Each expert writes the sum of its rows, to all of them."""

    def write(self, out, start, end, y):
        out[start:end] = y.sum(0)


class OneNotWritten(WrittenBlock):
    """The last expert's rows stay zero."""

    def product(self, rows, weight, counts):
        return super().product(rows, weight[:-1], counts)


class WrittenBeforeUse(WrittenBlock):
    """Each expert adds what is there already."""

    def write(self, out, start, end, y):
        out[start:end] = out[start:end] + y + out[:1] * 0.5


class ChangedOnceWritten(WrittenBlock):
    """What was written is doubled then, where it came from."""

    def write(self, out, start, end, y):
        out[start:end] = y
        y.mul_(2)


class OneWithoutGradient(WrittenBlock):
    """The first expert's rows are written without gradients."""

    def product(self, rows, weight, counts):
        self.first = True
        return super().product(rows, weight, counts)

    def write(self, out, start, end, y):
        with torch.set_grad_enabled(not self.first):
            out[start:end] = y
        self.first = False


class SeenBefore(WrittenBlock):
    """A view of the tensor is taken before the experts write, and read after."""

    def product(self, rows, weight, counts):
        out = torch.zeros(rows.shape[0], weight.shape[-1])
        seen, bounds = out[:4], self.bounds(counts)
        for e in range(E):
            start, end = bounds[e], bounds[e + 1]
            out[start:end] = rows[start:end] @ weight[e]
        return out + seen.sum()


class PutBackReversed(WrittenBlock):
    """Rows are put back in reverse."""

    def put_back(self, order, y):
        return super().put_back(order.flip(0), y)


class PutBackByAnotherSort(WrittenBlock):
    """Rows are put back as another sort of the ids had them."""

    def put_back(self, order, y):
        return super().put_back(order.argsort(), y)


STATE, GUARDS = "loop_changes_no_python_state", "guards_only_skip_empty_experts"
BOUNDS = "segments_are_those_of_an_expert"
WRITES, COVERED = "segments_are_written_once", "every_expert_is_covered"


class Searched(SlicedBlock):
    """Bounds that are searched for among the sorted ids."""

    def counts(self, ids):
        return ids.view(-1).sort().values

    def parts(self, rows, sorted_ids):
        ends = [torch.searchsorted(sorted_ids, e, right=True).item() for e in range(self.num_experts)]
        starts = [0, *ends[:-1]]
        return [self.experts[e](rows[starts[e] : ends[e]]) for e in range(self.num_experts)]


class SearchedFromLeft(SearchedBlock):
    """Where an expert's slots begin is taken for where they end."""

    def search(self, sorted_ids):
        return torch.searchsorted(sorted_ids, torch.arange(self.num_experts)).tolist()


class SearchedNext(SearchedBlock):
    """The next expert is searched for."""

    def search(self, sorted_ids):
        return torch.searchsorted(sorted_ids, torch.arange(1, self.num_experts + 1), right=True).tolist()


class SearchedAmongOthers(SearchedBlock):
    """The ids that are searched are those of half the experts."""

    def search(self, sorted_ids):
        return super().search(sorted_ids // 2)


class OfUniqueIds(SearchedBlock):
    """How many slots the experts with a token have, of which there may be fewer."""

    def moe(self, x, ids, weights):
        out, start = torch.zeros_like(x), 0
        sorted_ids, order = ids.sort()
        experts, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        for e, n in zip(experts.tolist(), counts.tolist(), strict=True):
            own = order[start : start + n]
            tokens = own // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[own])
            start += n
        return out


MISSES = (
    NearMiss("bounds_tensors_shifted", BOUNDS, TensorsShifted),
    NearMiss("bounds_tensors_changed", GUARDS, TensorsChanged),
    NearMiss("bounds_tensors_changed_and_copied", GUARDS, TensorsChangedAndCopied),
    NearMiss("bounds_start_written", BOUNDS, StartWritten),
    NearMiss("bounds_tensors_skip_singles", GUARDS, TensorsSkipSingles),
    NearMiss("bounds_skipped_by_neighbour", STATE, SkippedByNeighbour),
    NearMiss("bounds_start_shown", "parts_are_only_put_together", StartShown),
    NearMiss("bounds_starts_out_of_turn", STATE, StartsOutOfTurn),
    NearMiss("bounds_tensor_starts_out_of_turn", STATE, TensorStartsOutOfTurn),
    NearMiss("bounds_from_one", BOUNDS, BoundsFromOne),
    NearMiss("bounds_swapped", BOUNDS, BoundsSwapped),
    NearMiss("bounds_written_twice", COVERED, WrittenTwice),
    NearMiss("bounds_written_in_part", WRITES, WrittenInPart),
    NearMiss("bounds_one_not_written", COVERED, OneNotWritten),
    NearMiss("bounds_written_before_use", WRITES, WrittenBeforeUse),
    NearMiss("bounds_changed_once_written", WRITES, ChangedOnceWritten),
    NearMiss("bounds_one_without_gradient", WRITES, OneWithoutGradient),
    NearMiss("bounds_seen_before", WRITES, SeenBefore),
    NearMiss("bounds_searched", BOUNDS, Searched),
    NearMiss("bounds_of_unique_ids", BOUNDS, OfUniqueIds),
    NearMiss("bounds_searched_from_left", BOUNDS, SearchedFromLeft),
    NearMiss("bounds_searched_next", BOUNDS, SearchedNext),
    NearMiss("bounds_searched_among_others", BOUNDS, SearchedAmongOthers),
    NearMiss("bounds_put_back_reversed", None, PutBackReversed, may_rewrite=True),
    NearMiss("bounds_put_back_by_another_sort", None, PutBackByAnotherSort, may_rewrite=True),
)
