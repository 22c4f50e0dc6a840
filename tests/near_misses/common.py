"""A near miss: a program that looks like a Mixture-of-Experts loop and must not be taken for one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.common import Block, D, E, unit_scale_
from tests.zoo.stacked import StackedExperts, TopKRouter


@dataclass(frozen=True)
class NearMiss:
    """A row of the table: the program, and the rule which it breaks (None where no form looks at such a program).

    may_rewrite marks programs which an exact rewrite could serve: those must only stay equal to eager. at_first is the
    rule that it breaks while one iteration stands for its loop; what is said in the end is said of the unrolled loop.
    """

    name: str
    rule: str | None
    block: Callable[[], nn.Module]
    may_rewrite: bool = False
    train: bool = True
    at_first: str | None = None

    def make(self, seed=0):
        """The program with unit-scale weights; equal seeds give equal programs."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = unit_scale_(self.block())
        return module.train(self.train)


class Loop(Block):
    """Block with the lines before the loop factored out, so that a near miss shows its one oddity."""

    def begin(self, hidden_states):
        """Return x_TD, topk_ids_TK, topk_weights_TK, mask_EKT and an accumulator of zeros."""
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        return x, ids, weights, mask, torch.zeros_like(x)


def hits(mask):
    """The experts with at least one token, [H, 1]."""
    return torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()


class StackedLoop(nn.Module):
    """Router and stacked experts: no ModuleList, so one iteration may stand for all."""

    def __init__(self, classes=E):
        super().__init__()
        self.num_experts = E
        self.gate = TopKRouter(num_experts=classes)
        self.experts = StackedExperts()

    def begin(self, hidden_states, classes=E):
        """Return x_TD, topk_weights_TK, mask_EKT, hit_H1 and an accumulator of zeros."""
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, num_classes=classes).permute(2, 1, 0)
        return x, weights, mask, hits(mask), torch.zeros_like(x)

    def expert(self, x, e):
        gate, up = F.linear(x, self.experts.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.experts.down_proj[e])


class RangeLoop(StackedLoop):
    """The plainest loop, in steps of which a near miss replaces one."""

    def start(self, hidden_states):
        """Return x_TD, topk_weights_TK, mask_EKT and an accumulator of zeros."""
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        return x, weights, mask, torch.zeros_like(x)

    def prepare(self, x, ids, weights):
        """What the loop reads: x_TD, topk_ids_TK, topk_weights_TK."""
        return x, ids, weights

    def zeros(self, x):
        return torch.zeros_like(x)

    def value(self, x, weights, tokens, slots, e):
        """What expert e adds for its tokens."""
        return self.expert(x[tokens], e) * weights[tokens, slots, None]

    def add(self, out, tokens, y):
        out.index_add_(0, tokens, y)

    def aside(self, x, ids, tokens, e):
        """What else happens in an iteration."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        x, ids, weights = self.prepare(x, ids, weights)
        out = self.zeros(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            self.add(out, tokens, self.value(x, weights, tokens, slots, e))
            self.aside(x, ids, tokens, e)
        return out
