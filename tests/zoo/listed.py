"""Positions of slots in other shapes: those of all experts at once, three index tensors, columns of one tensor."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import E
from tests.zoo.masks import MaskLoop


class AllAtOnce(MaskLoop):
    """`torch.where` of the whole mask: experts, slots and tokens; each expert picks its own among them."""

    def listed(self, ids):
        return torch.where(F.one_hot(ids, E).permute(2, 1, 0))

    def mine(self, experts, e):
        return experts == e

    def moe(self, x, ids, weights):
        experts, slots, tokens = self.listed(ids)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = self.mine(experts, e)
            own, slot = tokens[mine], slots[mine]
            out.index_add_(0, own, expert(x[own]) * weights[own, slot, None])
        return out


class AllNonzero(AllAtOnce):
    """The same in the order of tokens."""

    def listed(self, ids):
        tokens, slots, experts = F.one_hot(ids, E).nonzero(as_tuple=True)
        return experts, slots, tokens


class KeptDim(MaskLoop):
    """A mask that keeps the dim of experts: three index tensors, the first of which is nothing."""

    def moe(self, x, ids, weights):
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            _, slots, tokens = torch.where(mask[e : e + 1])
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class Unbound(MaskLoop):
    """Columns of `nonzero()` by unbind; a mask that is transposed by `.T`."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots, tokens = (ids == e).T.nonzero().unbind(dim=-1)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


CASES = (
    Case("listed_all_at_once", AllAtOnce),
    Case("listed_all_nonzero", AllNonzero),
    Case("listed_kept_dim", KeptDim),
    Case("listed_unbound", Unbound),
)
