"""Writes under a name that no operation of the graph gave: inputs that lie in one memory, a tensor that is set."""

import torch

from tests.near_misses.common import NearMiss, RangeLoop
from tests.zoo.common import D


class WritesHalfOfBuffer(RangeLoop):
    """A second buffer is a part of the first, which the experts read."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(2 * D))
        self.register_buffer("part", self.shift[D:])

    def value(self, x, weights, tokens, slots, e):
        return super().value(x, weights, tokens, slots, e) + self.shift[-D:]

    def aside(self, x, ids, tokens, e):
        self.part.add_(1)


class WritesOtherHalf(WritesHalfOfBuffer):
    """What is written is not what is read."""

    def value(self, x, weights, tokens, slots, e):
        return RangeLoop.value(self, x, weights, tokens, slots, e) + self.rest

    def __init__(self):
        super().__init__()
        self.register_buffer("rest", self.shift[:D])


class WritesUnderSet(RangeLoop):
    """`set_` makes a tensor another's."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        base = x.detach() * 1
        rows = torch.zeros_like(base)
        rows.set_(base)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.value(rows, weights, tokens, slots, e))
            base.mul_(2)
        return out


RULE = "nothing_is_written_inside"

MISSES = (
    NearMiss("range_writes_half_of_buffer", RULE, WritesHalfOfBuffer),
    NearMiss("range_writes_other_half", None, WritesOtherHalf, may_rewrite=True),
    NearMiss("range_writes_under_set", RULE, WritesUnderSet),
)
