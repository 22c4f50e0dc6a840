"""Numbers of tokens read as a tensor, whose length is not known.

The graph breaks there, as Dynamo alone breaks it. What stands before the break may be rewritten.
"""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import E
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


MISSES = (
    NearMiss("loads_fewer_asked", "loop_has_a_known_form", FewerAsked, may_rewrite=True),
    NearMiss("loads_shifted_ids", "loop_has_a_known_form", ShiftedIds, may_rewrite=True),
    NearMiss("loads_written_ids", "loop_has_a_known_form", WrittenIds, may_rewrite=True),
    NearMiss("loads_weighted", "loop_has_a_known_form", Weighted, may_rewrite=True),
    NearMiss("loads_alone", "loop_has_a_known_form", CountedAlone),
)
