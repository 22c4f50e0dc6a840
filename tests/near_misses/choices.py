"""Outputs for one choice of a token each, which are those of more or fewer."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.choices import Choices, WeightedInside


class Shared(Choices):
    """One output for all choices: the last one stays."""

    def moe(self, x, ids, weights):
        y = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, expert in enumerate(self.experts):
                m = ids[:, k] == e
                y[m] = expert(x[m])
        return y * weights.sum(1, keepdim=True)


class OtherChoice(Choices):
    """The last expert writes to the tokens of another choice."""

    def moe(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e in range(self.num_experts):
            m = ids[:, 0 if e < self.num_experts - 1 else 1] == e
            y[m] = self.experts[e](x[m])
        return y


class WrittenBefore(Choices):
    """The choices change between two experts."""

    def one(self, x, chosen):
        y = torch.zeros_like(x)
        chosen = chosen.clone()
        for e, expert in enumerate(self.experts):
            m = chosen == e
            y[m] = expert(x[m])
            chosen[m] = 0
        return y


class ReadInside(Choices):
    """The output is read between two experts."""

    def put(self, y, expert, x, m):
        y[m] = expert(x[m]) + y.mean()
        return y


class LeftOut(Choices):
    """One expert writes nothing."""

    def one(self, x, chosen):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if e == 1:
                continue
            y[chosen == e] = expert(x[chosen == e])
        return y


class WeightOfAnother(WeightedInside):
    """The weight that the expert has in another choice."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                m = ids[:, k] == e
                y[m] = expert(x[m]) * weights[m, 1 - k, None]
            out += y
        return out


class WeightWritten(WeightedInside):
    """The weights change between two experts."""

    def one(self, x, chosen, w):
        y = torch.zeros_like(x)
        w = w.clone()
        for e, expert in enumerate(self.experts):
            m = chosen == e
            y[m] = expert(x[m]) * w[m, None]
            w.mul_(0.5)
        return y


class WeightOfAllRows(WeightedInside):
    """Each row by the mean of the weights of all rows that the expert has."""

    def one(self, x, chosen, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = chosen == e
            if m.any():
                y[m] = expert(x[m]) * w[m].mean()
        return y


class WeightReturned(WeightedInside):
    """The last expert's weights are used once more."""

    def one(self, x, chosen, w):
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            m = chosen == e
            own = w[m, None]
            y[m] = expert(x[m]) * own
        return y + own.sum()


MISSES = (
    NearMiss("choices_shared", "every_expert_is_covered", Shared),
    NearMiss("choices_other_choice", "assignments_overwrite_nothing", OtherChoice),
    NearMiss("choices_written_before", "no_intermediate_escapes", WrittenBefore),
    NearMiss("choices_read_inside", "accumulator_is_not_read_inside", ReadInside),
    NearMiss("choices_left_out", "every_expert_is_covered", LeftOut),
    NearMiss("choices_weight_of_another", "bodies_are_isomorphic", WeightOfAnother),
    NearMiss("choices_weight_written", "nothing_is_written_inside", WeightWritten),
    NearMiss("choices_weight_of_all_rows", "body_is_row_wise", WeightOfAllRows),
    NearMiss("choices_weight_used_again", "no_intermediate_escapes", WeightReturned),
)
