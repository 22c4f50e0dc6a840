"""One naive MoE program: how to build it and what the rewrite should find in it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.zoo.common import E, K, unit_scale_


@dataclass(frozen=True)
class Case:
    """A row of the zoo.

    op is the operator the region must become, None where any sound choice will do. must_rewrite is False for programs
    which need only stay correct. train is False for programs which are MoE loops in eval() alone. regions is how many
    are found in it. differentiable is False for programs whose output has no gradient.
    """

    name: str
    block: Callable[[], nn.Module]
    num_experts: int = E
    top_k: int = K
    activation: str | None = "silu"
    op: str | None = "mlp"
    must_rewrite: bool = True
    train: bool = True
    random: bool = False
    regions: int = 1
    differentiable: bool = True

    def make(self, seed=0, dtype=torch.float32):
        """The block with unit-scale weights; equal seeds give equal blocks."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = unit_scale_(self.block())
        return module.to(dtype).train(self.train)
