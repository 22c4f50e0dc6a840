"""An expert's own parameters, taken or multiplied with in a way that no rule speaks of."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E
from tests.zoo.parameters import Biases, Taken


class Rounded(Taken):
    """Weights are rounded before they are used."""

    def expert(self, x, e):
        return x @ self.experts.down_proj[e].bfloat16().float()[:, :D].t()


class HalfOfTheBias(Biases):
    """`addmm` counts the bias half."""

    def down(self, h, e):
        return torch.addmm(self.down_bias[e], h, self.experts.down_proj[e].t(), beta=0.5)


class SummedOverTokens(Biases):
    """An einsum that sums over the rows."""

    def down(self, h, e):
        return super().down(h, e) + torch.einsum("tf,df->d", h, self.experts.down_proj[e])


class NextBias(Biases):
    """Each expert has the bias of the next."""

    def down(self, h, e):
        return torch.mm(h, self.experts.down_proj[e].t()) + self.down_bias[(e + 1) % E, None]


MISSES = (
    NearMiss("parameters_rounded", "body_is_row_wise", Rounded),
    NearMiss("parameters_half_of_the_bias", "body_is_row_wise", HalfOfTheBias),
    NearMiss("parameters_summed_over_tokens", "body_is_row_wise", SummedOverTokens),
    NearMiss("parameters_next_bias", "bodies_are_isomorphic", NextBias),
)
