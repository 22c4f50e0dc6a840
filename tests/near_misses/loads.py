"""Numbers of tokens read as a tensor, whose length is not known.

The graph breaks there, as Dynamo alone breaks it. What stands before the break may be rewritten.
"""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
from tests.zoo.loads import CountedInside, CountedOfHit, SummedBySlot
from tests.zoo.masks import MaskLoop


class LoadedLoop(MaskLoop):
    """Numbers of tokens scale the output; a near miss counts something else."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        load = self.count(ids)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out * (load.float().std() + load.shape[0])


class FewerAsked(LoadedLoop):
    """As many numbers as the largest id asks for, two at least."""

    def count(self, ids):
        return torch.bincount(ids.flatten(), minlength=2)


class ShiftedIds(LoadedLoop):
    """Ids from 2 on: more numbers than experts."""

    def count(self, ids):
        return torch.bincount(ids.flatten() + 2, minlength=E)


class WrittenIds(LoadedLoop):
    """The ids that are counted were moved in place."""

    def count(self, ids):
        moved = ids.flatten().clone()
        moved += 2
        return torch.bincount(moved, minlength=E)


class Weighted(LoadedLoop):
    """Weighted numbers."""

    def count(self, ids):
        flat = ids.flatten()
        return torch.bincount(flat, weights=torch.arange(flat.shape[0], dtype=torch.float32), minlength=E)


class CountedAlone(MaskLoop):
    """Numbers of what a router chose, and no experts."""

    def moe(self, x, ids, weights):
        return x * torch.bincount(ids.flatten(), minlength=E).float().std()


class LastSeen(CountedOfHit):
    """Experts without a token keep the number of an earlier call."""

    def count(self, e, tokens):
        self.usage[e] = len(tokens)


class CallsCounted(CountedOfHit):
    """In how many calls each expert had a token."""

    def count(self, e, tokens):
        self.usage[e] += 1


class InHalf(CountedInside):
    """Python's number is added to one in half precision, which a tensor's would be rounded to first."""

    def __init__(self):
        super().__init__()
        self.usage = self.usage.bfloat16()

    def count(self, e, tokens):
        self.usage[e] += len(tokens)


class InPython(CountedInside):
    """A list of the module has the numbers."""

    def moe(self, x, ids, weights):
        self.load = []
        return super().moe(x, ids, weights)

    def count(self, e, tokens):
        self.load.append(len(tokens))


class OfAnotherUnderGuard(SummedBySlot):
    """Where an expert has no tokens the next one's are not counted."""

    def count(self, ids, k, e):
        return (ids[:, k] == (e + 1) % self.num_experts).sum()

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                m = ids[:, k] == e
                if m.any():
                    out[m] += weights[m, k].unsqueeze(-1) * self.experts[e](x[m])
                    self.usage[e] += self.count(ids, k, e)
        return out


class OfAllSlotsUnderGuard(OfAnotherUnderGuard):
    """Tokens of all slots, counted where there are some in one of them."""

    def count(self, ids, k, e):
        return (ids == e).sum()


class OneUnderGuard(OfAnotherUnderGuard):
    """In how many slots each expert had a token."""

    def count(self, ids, k, e):
        return torch.ones_like(self.usage[e])


GUARDS = "guards_only_skip_empty_experts"

MISSES = (
    NearMiss("loads_of_another_under_guard", GUARDS, OfAnotherUnderGuard),
    NearMiss("loads_of_all_slots_under_guard", GUARDS, OfAllSlotsUnderGuard),
    NearMiss("loads_one_under_guard", GUARDS, OneUnderGuard),
    NearMiss("loads_last_seen", GUARDS, LastSeen),
    NearMiss("loads_calls_counted", GUARDS, CallsCounted),
    NearMiss("loads_in_half", "no_intermediate_escapes", InHalf),
    NearMiss("loads_in_python", "no_intermediate_escapes", InPython),
    NearMiss("loads_fewer_asked", "loop_has_a_known_form", FewerAsked, may_rewrite=True),
    NearMiss("loads_shifted_ids", "loop_has_a_known_form", ShiftedIds, may_rewrite=True),
    NearMiss("loads_written_ids", "loop_has_a_known_form", WrittenIds, may_rewrite=True),
    NearMiss("loads_weighted", "loop_has_a_known_form", Weighted, may_rewrite=True),
    NearMiss("loads_alone", "loop_has_a_known_form", CountedAlone),
)
