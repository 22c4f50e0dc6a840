"""Loops over the numbers of the experts that were hit, as Python lists and sets have them."""

import torch
from torch import nn

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop
from tests.zoo.stacked import StackedExperts, TopKRouter


class Listed(MaskLoop):
    """`for e in ids.unique().tolist()`."""

    def listed(self, ids):
        return ids.unique().tolist()

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in self.listed(ids):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class OnHost(Listed):
    """Ids are flattened, and the list comes to the host in steps."""

    def listed(self, ids):
        return torch.unique(ids.view(-1)).detach().cpu().tolist()


class InSet(Listed):
    """A set of all ids, sorted."""

    def listed(self, ids):
        return sorted(set(ids.flatten().tolist()))


class InPlainSet(Listed):
    """The set itself."""

    def listed(self, ids):
        return set(ids.flatten().tolist())


class Items(Listed):
    """`e.item()` of an expert that was hit."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in torch.unique(ids):
            number = e.item()
            tokens, slots = torch.where(ids == number)
            out.index_add_(0, tokens, self.experts[number](x[tokens]) * weights[tokens, slots, None])
        return out


class Enumerated(MaskLoop):
    """`for i, e in enumerate(ids.unique())`, and `i` is not read."""

    def hit(self, ids):
        return ids.unique()

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for _, e in enumerate(self.hit(ids)):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class EnumeratedNumbers(Enumerated):
    """The same over a list of numbers."""

    def hit(self, ids):
        return ids.unique().tolist()


class BySlot(Listed):
    """In each slot the experts that were hit in it."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in ids[:, k].unique().tolist():
                m = ids[:, k] == e
                out[m] += self.experts[e](x[m]) * weights[m, k, None]
        return out


class BySlotOnce(BySlot):
    """The same for top-1, where the slots are one column of the ids."""

    def __init__(self):
        super().__init__(top_k=1, normalize=False)


class Stacked(nn.Module):
    """Stacked weights that are picked by such a number."""

    def __init__(self):
        super().__init__()
        self.gate = TopKRouter()
        self.experts = StackedExperts()

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            tokens, slots = torch.where(ids == e)
            gate, up = (x[tokens] @ self.experts.gate_up_proj[e].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * up) @ self.experts.down_proj[e].T
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out.view_as(hidden_states)


CASES = (
    Case("hit_list", Listed),
    Case("hit_list_on_host", OnHost),
    Case("hit_list_set_sorted", InSet),
    Case("hit_list_set", InPlainSet),
    Case("hit_list_items", Items),
    Case("hit_enumerated", Enumerated),
    Case("hit_enumerated_numbers", EnumeratedNumbers),
    Case("hit_list_by_slot", BySlot),
    Case("hit_list_by_slot_once", BySlotOnce, top_k=1),
    Case("hit_list_stacked", Stacked),
)
