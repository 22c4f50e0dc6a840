"""Lists that lack what experts without a token would have added, of which more is asked than to be put together."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.filtered import Filtered


class Longest(Filtered):
    """Experts with one token are left out as well."""

    def made(self, segments):
        return [expert(rows) for expert, rows in zip(self.experts, segments, strict=True) if len(rows) > 1]

    def combine(self, grouped, x, order, weights):
        return x + grouped.sum(0)


class FirstPart(Filtered):
    """The first of what is left."""

    def combine(self, grouped, x, order, weights):
        return super().combine(grouped, x, order, weights) + self.first

    def made(self, segments):
        parts = super().made(segments)
        self.first = parts[0].mean()
        return parts


class Twice(Filtered):
    """What is left is listed again."""

    def made(self, segments):
        return [2 * part for part in super().made(segments)]


class LoopedOver(Filtered):
    """A sum over the list: empty parts would count."""

    def combine(self, grouped, x, order, weights):
        return super().combine(grouped, x, order, weights) * self.counted

    def made(self, segments):
        parts = super().made(segments)
        self.counted = sum(1 for _ in parts)
        return parts


class InDict(Filtered):
    """A dict by expert, of which the values are put together."""

    def made(self, segments):
        parts = {e: self.experts[e](rows) for e, rows in enumerate(segments) if len(rows)}
        return list(parts.values())


class OfAnother(Filtered):
    """The condition is that another expert has a token."""

    def made(self, segments):
        shifted = (*segments[1:], segments[0])
        pairs = zip(self.experts, segments, shifted, strict=True)
        return [expert(rows) for expert, rows, other in pairs if len(other)]

    def combine(self, grouped, x, order, weights):
        return x + grouped.sum(0)


class WithOnes(Filtered):
    """A row of ones is added for each expert with a token."""

    def made(self, segments):
        ones = torch.ones_like(segments[0][:0].sum(0, keepdim=True))
        return [
            torch.cat([expert(rows), ones]) for expert, rows in zip(self.experts, segments, strict=True) if len(rows)
        ]

    def combine(self, grouped, x, order, weights):
        return x + grouped.sum(0)


PARTS = "parts_are_only_put_together"
MISSES = (
    NearMiss("filtered_longest", "guards_only_skip_empty_experts", Longest),
    NearMiss("filtered_first_part", PARTS, FirstPart),
    NearMiss("filtered_twice", PARTS, Twice),
    NearMiss("filtered_looped_over", PARTS, LoopedOver),
    NearMiss("filtered_in_dict", "loop_changes_no_python_state", InDict),
    NearMiss("filtered_of_another", "loop_changes_no_python_state", OfAnother),
    NearMiss("filtered_with_ones", "loop_changes_no_python_state", WithOnes),
)
