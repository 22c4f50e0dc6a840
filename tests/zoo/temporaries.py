"""Experts that write to tensors of their own: the weighted rows, an activation in place, a gate, a residual."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.masks import MaskLoop


class Temporaries(MaskLoop):
    """Rows are weighted in place."""

    def expert(self, e, x):
        return self.experts[e](x)

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            y = self.expert(e, x[tokens])
            y *= weights[tokens, slots, None]
            out.index_add_(0, tokens, y)
        return out


class Cast(Temporaries):
    """To the dtype that the rows have already: another name of the same rows."""

    def expert(self, e, x):
        return self.experts[e](x).to(x.dtype)


class Activated(Temporaries):
    """`inplace=True`."""

    def expert(self, e, x):
        own = self.experts[e]
        return own.w2(F.silu(own.w1(x), inplace=True) * own.w3(x))


class Gated(Temporaries):
    """Two writes to one tensor, one of them by what the other returned."""

    def expert(self, e, x):
        own = self.experts[e]
        h = own.w1(x)
        h.add_(1).mul_(own.w3(x))
        h.relu_()
        return own.w2(h)


class Residual(Temporaries):
    """Rows are scaled, and added to what the expert makes of them."""

    def expert(self, e, x):
        x *= 0.5
        y = super().expert(e, x)
        y += x
        return y


CASES = (
    Case("temporaries_weighted", Temporaries),
    Case("temporaries_cast", Cast),
    Case("temporaries_activated", Activated),
    Case("temporaries_gated", Gated, op="parallel_linear", activation="any"),
    Case("temporaries_residual", Residual, op="parallel_linear", activation="any"),
)
