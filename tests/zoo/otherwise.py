"""Guards with another side for experts without tokens, which the module's flags say is not run."""

import torch

from tests.zoo.case import Case
from tests.zoo.masks import MaskLoop


class TouchedInTraining(MaskLoop):
    """minimind: in training an expert without tokens is touched, so that its parameters have a gradient."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                tokens = mask.any(dim=-1).nonzero().flatten()
                out.index_add_(0, tokens, expert(x[tokens]) * weights[mask].view(-1, 1))
            elif self.training:
                self.touch(out, expert)
        return out

    def touch(self, out, expert):
        out[0, 0] += 0 * sum(parameter.sum() for parameter in expert.parameters())


class TouchedOnDemand(TouchedInTraining):
    """A flag of its own, and the sides the other way round; stays off in training."""

    def __init__(self):
        super().__init__()
        self.touches = False

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            if tokens.numel() == 0:
                if self.touches:
                    self.touch(out, self.experts[e])
                continue
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


CASES = (
    Case("otherwise_touched_in_training", TouchedInTraining, train=False),
    Case("otherwise_touched_on_demand", TouchedOnDemand),
)
