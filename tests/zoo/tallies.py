"""Sorted segments whose lengths are added up by hand: ones by id, a table of ones, a sum for each expert."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import E
from tests.zoo.segments import SegmentBlock, SkippingBlock, SlicedBlock


class ScatterAdded(SegmentBlock):
    """Ones are added in place where the zeros are made."""

    def counts(self, ids):
        flat = ids.flatten()
        return torch.zeros(E, dtype=torch.long, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


class IndexAddedLater(SlicedBlock):
    """In a statement of its own, in float; the numbers are read as integers."""

    def counts(self, ids):
        flat = ids.view(-1)
        counts = torch.zeros(E, device=ids.device)
        counts.index_add_(0, flat, torch.ones(flat.shape[0], device=ids.device))
        return counts.long()


class AddedAnew(SkippingBlock):
    """Not in place; experts without tokens are skipped."""

    def counts(self, ids):
        flat = ids.reshape(-1)
        return ids.new_zeros(E).scatter_add(0, flat, flat.new_full(flat.shape, 1))


class TableAdded(SegmentBlock):
    """Ones are added to a table of tokens and experts, whose rows are summed."""

    def counts(self, ids):
        table = torch.zeros(ids.shape[0], E, dtype=torch.int64, device=ids.device)
        return table.scatter_add(1, ids, torch.ones_like(ids)).sum(0)


class TableFilled(SlicedBlock):
    """The table is written to where it is made, in float."""

    def counts(self, ids):
        return torch.zeros(ids.shape[0], E, device=ids.device).scatter_(1, ids, 1.0).sum(dim=0).int()


class OneHotOfSlots(SegmentBlock):
    """One-hot rows of all slots."""

    def counts(self, ids):
        return F.one_hot(ids.view(-1), num_classes=E).sum(dim=0)


class ListedSums(SegmentBlock):
    """A Python list with a sum for each expert."""

    def counts(self, ids):
        return ids

    def lengths(self, flat):
        return [int((flat == e).sum()) for e in range(E)]

    def parts(self, rows, counts):
        segments = rows.split(self.lengths(counts.view(-1)))
        return [expert(segment) for expert, segment in zip(self.experts, segments, strict=True)]


class SumsOnTheWay(SegmentBlock):
    """Each sum is read when the expert's turn comes."""

    def counts(self, ids):
        return ids

    def number(self, ids, e):
        return (ids == e).sum().item()

    def parts(self, rows, counts):
        outputs, start = [], 0
        for e, expert in enumerate(self.experts):
            count = self.number(counts, e)
            if count == 0:
                continue
            outputs.append(expert(rows[start : start + count]))
            start += count
        return outputs


class StackedSums(SkippingBlock):
    """A sum for each expert, put together to a tensor."""

    def counts(self, ids):
        return torch.stack([(ids == e).sum() for e in range(E)])


CASES = (
    Case("tallies_scatter_added", ScatterAdded),
    Case("tallies_index_added_later", IndexAddedLater),
    Case("tallies_added_anew", AddedAnew),
    Case("tallies_table_added", TableAdded),
    Case("tallies_table_filled", TableFilled),
    Case("tallies_one_hot_of_slots", OneHotOfSlots),
    Case("tallies_listed_sums", ListedSums),
    Case("tallies_sums_on_the_way", SumsOnTheWay),
    Case("tallies_stacked_sums", StackedSums),
)
