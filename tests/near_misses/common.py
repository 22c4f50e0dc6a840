"""A near miss: a program that looks like a Mixture-of-Experts loop and must not be taken for one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.zoo.common import Block, D, unit_scale_


@dataclass(frozen=True)
class NearMiss:
    """A row of the table: the program, and the rule which it breaks (None where no form looks at such a program).

    may_rewrite marks programs which an exact rewrite could serve: those must only stay equal to eager.
    """

    name: str
    rule: str | None
    block: Callable[[], nn.Module]
    may_rewrite: bool = False
    train: bool = True

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
