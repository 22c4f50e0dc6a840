"""Loops in functions of their own, whose callers write afterwards to what the experts read and eager doesn't keep.

The write is seen where all is traced in one frame. Then the loop is left to Dynamo, which makes a frame of its
function, and there it must not be rewritten either.
"""

import torch
from torch import nn

from tests.near_misses.common import NearMiss
from tests.zoo.common import FF, D, E
from tests.zoo.masks import MaskLoop


def run_experts(x, ids, weights, experts):
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, experts[e](x[tokens]) * weights[tokens, slots, None])
    return out


def scale_bias(experts):
    bias = next(parameter for parameter in experts[0].parameters() if parameter.dim() == 1)
    with torch.no_grad():
        bias.mul_(0.5)


class BiasedLoop(MaskLoop):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)) for _ in range(E))


class BiasWritten(BiasedLoop):
    """By the function that calls the loop's."""

    def moe(self, x, ids, weights):
        out = run_experts(x, ids, weights, self.experts)
        scale_bias(self.experts)
        return out


class Inner(BiasedLoop):
    def moe(self, x, ids, weights):
        return run_experts(x, ids, weights, self.experts)


class BiasWrittenOutside(nn.Module):
    """By a function two calls further out, in another module."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, hidden_states):
        out = self.inner(hidden_states)
        scale_bias(self.inner.experts)
        return out


class RowsWritten(BiasedLoop):
    """The rows that the experts' tokens were gathered from."""

    def moe(self, x, ids, weights):
        rows = x * 1
        out = run_experts(rows, ids, weights, self.experts)
        return out + rows.add_(1)


RULE = "tensors_for_backward_stay_as_they_are"

MISSES = (
    NearMiss("caller_writes_bias", RULE, BiasWritten),
    NearMiss("caller_of_caller_writes_bias", RULE, BiasWrittenOutside),
    NearMiss("caller_writes_rows", RULE, RowsWritten),
)
