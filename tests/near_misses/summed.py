"""Outputs of the full size that are summed, but not all, not as they are, or not alone."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop
from tests.zoo.summed import AddedInLoop, BufferBehindTokens, PutAnew, Stacked


class LeftOut(Stacked):
    """The first expert's output is not summed."""

    def total(self, outputs):
        return torch.stack(outputs[1:]).sum(dim=0)


class AddedTwice(Stacked):
    """The first expert's output counts twice."""

    def total(self, outputs):
        return sum(outputs) + outputs[0]


class Scaled(Stacked):
    """One output is doubled in place before all are summed."""

    def total(self, outputs):
        outputs[1].mul_(2)
        return sum(outputs)


class SomeMixed(Stacked):
    """The mean of one output is used as well."""

    def total(self, outputs):
        return torch.stack(outputs).sum(dim=0) + outputs[0].mean()


class AddedToItsOwn(Stacked):
    """What the outputs are added to is computed from the first of them."""

    def total(self, outputs):
        return torch.tanh(outputs[0]) + sum(outputs)


class StartsAsOnes(Stacked):
    """Tokens that aren't an expert's get ones of it."""

    def one(self, x, ids, weights, e):
        y = torch.ones_like(x)
        tokens, slots = torch.where(ids == e)
        y[tokens] = self.experts[e](x[tokens]) * weights[tokens, slots, None]
        return y


class RepeatedIds(Stacked):
    """Both ids of a token may be the same, of which one row stays."""

    def moe(self, x, ids, weights):
        return super().moe(x, ids.clamp(max=1) + ids // 3, weights)


class AddedBeforeWritten(AddedInLoop):
    """The last output is added while it still is zero."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = torch.zeros_like(x)
            m = (ids == e).any(-1)
            is_last = e == self.num_experts - 1
            out = out + y if is_last else out
            y[m] = expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]
            out = out if is_last else out + y
        return out


class GuardOfAnother(AddedInLoop):
    """An output is added if the next expert has a token."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y, m = torch.zeros_like(x), (ids == e).any(-1)
            y[m] = expert(x[m]) * (weights * (ids == e)).sum(-1)[m, None]
            if not (ids[:2] == (e + 1) % self.num_experts).any():
                continue
            out = out + y
        return out


class SharedPlaces(BufferBehindTokens):
    """Two experts assign to one place of a token, and the last one's row stays."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(x.shape[0], self.num_experts // 2, D)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y[tokens, e // 2] = expert(x[tokens]) * weights[tokens, slots, None]
        return y.sum(1)


class MaxOfPlaces(BufferBehindTokens):
    """The largest entry of all places, one of which may be zero."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(x.shape[0], self.num_experts, D)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y[tokens, e] = expert(x[tokens]) * weights[tokens, slots, None]
        return y.amax(1)


class FromOneStart(PutAnew):
    """Of new tensors made of the same zeros the last alone is summed, with a second list."""

    def total(self, outputs):
        return outputs[0] + outputs[-1]


class OtherWeights(MaskLoop):
    """An output is weighted by all rows of its expert."""

    def moe(self, x, ids, weights):
        y = x.new_zeros(self.num_experts, *x.shape)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y[e, tokens] = expert(x[tokens]) * weights[tokens, slots, None].mean(0)
        return y.sum(dim=0)


COVERED = "every_expert_is_covered"
OVERWRITTEN = "assignments_overwrite_nothing"
MISSES = (
    NearMiss("summed_left_out", COVERED, LeftOut),
    NearMiss("summed_twice", "no_intermediate_escapes", AddedTwice),
    NearMiss("summed_scaled", "no_intermediate_escapes", Scaled),
    NearMiss("summed_read", "no_intermediate_escapes", SomeMixed),
    NearMiss("summed_onto_its_own", "no_intermediate_escapes", AddedToItsOwn),
    NearMiss("summed_ones", OVERWRITTEN, StartsAsOnes),
    NearMiss("summed_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("summed_before_written", "accumulator_is_not_read_inside", AddedBeforeWritten),
    NearMiss("summed_guard_of_another", "guards_are_of_the_same_expert", GuardOfAnother),
    NearMiss("summed_shared_places", OVERWRITTEN, SharedPlaces),
    NearMiss("summed_largest", "loop_has_a_known_form", MaxOfPlaces),
    NearMiss("summed_in_part", COVERED, FromOneStart),
    NearMiss("summed_mean_weight", "body_is_row_wise", OtherWeights),
)
