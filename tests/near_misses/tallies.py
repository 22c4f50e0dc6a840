"""Lengths of segments that are added up by hand, almost."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.segments_of_slots import StartsBlock
from tests.zoo.tallies import (
    IndexAddedLater,
    ListedSums,
    SlicedBlock,
    StackedSums,
    TableAdded,
)


class Padded(SlicedBlock):
    """What was cut from the sorted rows is filled up with zeros."""

    def parts(self, rows, counts):
        return self.padded(rows, super().parts(rows, counts))

    def padded(self, rows, outputs):
        left = rows.shape[0] - sum(len(output) for output in outputs)
        return [*outputs, rows.new_zeros(max(left, 0), rows.shape[1])]


class EvenTokens(Padded):
    """Only slots with an even number are counted."""

    def counts(self, ids):
        flat = ids.view(-1)
        even = 1 - torch.arange(flat.shape[0]) % 2
        return torch.zeros(E, dtype=torch.long).scatter_add_(0, flat, even)


class OnesWritten(Padded):
    """The first slot is not counted."""

    def counts(self, ids):
        flat = ids.view(-1)
        ones = torch.ones_like(flat)
        ones[0] = 0
        return torch.zeros(E, dtype=torch.long).index_add(0, flat, ones)


class AddedWithFactor(Padded):
    """Each slot counts as two."""

    def counts(self, ids):
        flat = ids.view(-1)
        return torch.zeros(E, dtype=torch.long).index_add_(0, flat, torch.ones_like(flat), alpha=2)


class CountedFromOne(SlicedBlock):
    """Each number is one too large: segments begin further and further behind the expert's rows."""

    def counts(self, ids):
        flat = ids.view(-1)
        return torch.ones(E, dtype=torch.long).scatter_add_(0, flat, torch.ones_like(flat))


class ChangedAfterwards(IndexAddedLater):
    """A slot of the first expert goes to the last one once they were counted."""

    def counts(self, ids):
        counts = super().counts(ids)
        move = (counts[0] > 0).long()
        counts[0] -= move
        counts[-1] += move
        return counts


class AddedTwice(Padded):
    """All ids are counted, and once more what half of them are."""

    def counts(self, ids):
        flat = ids.view(-1)
        counts = torch.zeros(E, dtype=torch.long)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        counts.scatter_add_(0, flat // 2, torch.ones_like(flat))
        return counts


class ReadWhileEmpty(Padded):
    """The places where segments begin are computed before the numbers are: all begin with the first row."""

    def counts(self, ids):
        return ids

    def parts(self, rows, counts):
        flat = counts.view(-1)
        counts = torch.zeros(E, dtype=torch.long)
        starts = counts.cumsum(0)
        counts.scatter_add_(0, flat, torch.ones_like(flat))
        pairs = zip(counts.tolist(), starts.tolist(), strict=True)
        outputs = [self.experts[e](rows[start : start + count]) for e, (count, start) in enumerate(pairs)]
        return self.padded(rows, outputs)


class TableOfHalves(TableAdded):
    """Experts share the slots with their neighbours."""

    def counts(self, ids):
        return super().counts(ids // 2 * 2)


class RepeatedInTable(Padded):
    """Ids of a token may repeat: a table that is written has them once."""

    def route(self, x_TD):
        first, ids, weights = super().route(x_TD)
        return first, ids // 2, weights

    def counts(self, ids):
        return torch.zeros(ids.shape[0], E, dtype=torch.long).scatter(1, ids, 1).sum(0)


class SumsOfNext(ListedSums):
    """The sums begin with that of the second expert."""

    def lengths(self, flat):
        return [int((flat == (e + 1) % E).sum()) for e in range(E)]


class ReadInTurn(Padded):
    """Each sum is read when the expert's turn comes."""

    def counts(self, ids):
        return ids

    def number(self, ids, e):
        return (ids == e).sum().item()

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, expert in enumerate(self.experts):
            count = self.number(counts, e)
            outputs.append(expert(rows[start : start + count]))
            start += count
        return self.padded(rows, outputs)


class SumsOfFirstChoice(ReadInTurn):
    """Only first choices are counted."""

    def number(self, ids, e):
        return (ids[:, 0] == e).sum().item()


class SumsOfChangedMasks(ReadInTurn):
    """The first slot is taken out of a mask before it is summed."""

    def number(self, ids, e):
        mask = ids == e
        mask[0, 0] = False
        return int(mask.sum())


class StackedBackwards(StackedSums):
    """The numbers of the last expert first."""

    def counts(self, ids):
        return super().counts(ids).flip(0)


class EndsTooEarly(StartsBlock):
    """The last slot of each expert is left out."""

    def bounds(self, counts):
        starts, ends = super().bounds(counts)
        return starts, ends - 1


class StartsLessOthers(StartsBlock):
    """Another expert's number is taken off where one's slots end."""

    def bounds(self, counts):
        ends = counts.cumsum(0)
        return ends - counts.flip(0), ends


class StartsLessOne(StartsBlock):
    """The first expert's number is taken off for every expert."""

    def bounds(self, counts):
        ends = counts.cumsum(0)
        return ends - counts[:1], ends


class NeighboursCounted(SlicedBlock):
    """Each slot is counted for the expert after its own."""

    def counts(self, ids):
        return torch.bincount((ids.view(-1) + 1) % E, minlength=E)


class PutTogether(SlicedBlock):
    """Ones are put, and put together, at what is not known to count: this may be right."""

    def counts(self, ids):
        flat = ids.view(-1)
        return torch.zeros(E, dtype=torch.long).index_put_((flat,), torch.ones_like(flat), accumulate=True)


class NeighboursPutTogether(PutTogether):
    """The same for the expert after a slot's own."""

    def counts(self, ids):
        return super().counts((ids + 1) % E)


SEGMENTS = "segments_are_those_of_an_expert"

MISSES = (
    NearMiss("tallies_of_even_tokens", SEGMENTS, EvenTokens),
    NearMiss("tallies_ones_written", SEGMENTS, OnesWritten),
    NearMiss("tallies_with_factor", SEGMENTS, AddedWithFactor),
    NearMiss("tallies_from_one", SEGMENTS, CountedFromOne),
    NearMiss("tallies_changed_afterwards", SEGMENTS, ChangedAfterwards),
    NearMiss("tallies_added_twice", SEGMENTS, AddedTwice),
    NearMiss("tallies_read_while_empty", SEGMENTS, ReadWhileEmpty),
    NearMiss("tallies_of_halves", "ids_are_in_range", TableOfHalves),
    NearMiss("tallies_repeated_in_table", "ids_are_in_range", RepeatedInTable),
    NearMiss("tallies_sums_of_next", "loop_has_a_known_form", SumsOfNext),
    NearMiss("tallies_sums_of_first_choice", SEGMENTS, SumsOfFirstChoice),
    NearMiss("tallies_sums_of_changed_masks", SEGMENTS, SumsOfChangedMasks),
    NearMiss("tallies_stacked_backwards", SEGMENTS, StackedBackwards),
    NearMiss("tallies_ends_too_early", SEGMENTS, EndsTooEarly),
    NearMiss("tallies_starts_less_others", SEGMENTS, StartsLessOthers),
    NearMiss("tallies_starts_less_one", SEGMENTS, StartsLessOne),
    NearMiss("tallies_of_neighbours", "ids_are_in_range", NeighboursCounted),
    NearMiss("tallies_put_together", SEGMENTS, PutTogether, may_rewrite=True),
    NearMiss("tallies_of_neighbours_put_together", SEGMENTS, NeighboursPutTogether),
)
