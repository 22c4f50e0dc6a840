"""Loops over (token, slot) pairs: flat with rows repeated for each slot or tokens found by division; in two dims."""

import torch

from tests.zoo.case import Case
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class FlatWeightedInside(MaskLoop):
    """Rows are weighted as they are written, into zeros; the slots' plain sum."""

    def moe(self, x, ids, weights):
        flat = ids.flatten()
        rows = torch.repeat_interleave(x, self.top_k, dim=0)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            if mask.any():
                y[mask] += expert(rows[mask]) * weights.view(-1, 1)[mask]
        return y.reshape(-1, self.top_k, D).sum(dim=1)


class FlatWeightedInPlace(MaskLoop):
    """Positions instead of masks; the slots are cast, weighted in place, summed, cast back."""

    def moe(self, x, ids, weights):
        flat, weights = ids.reshape(-1), weights.float()
        rows = x.repeat_interleave(self.top_k, dim=0)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            slots = torch.where(flat == e)[0]
            y[slots] = expert(rows[slots])
        y = y.view(*ids.shape, -1).type(weights.dtype)
        return y.mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(x.dtype)


class FlatToTokens(MaskLoop):
    """The slots' tokens by division; no row is repeated."""

    def moe(self, x, ids, weights):
        flat, flat_weights = ids.view(-1), weights.view(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots = (flat == e).nonzero().flatten()
            if len(slots) == 0:
                continue
            tokens = slots // self.top_k
            out.index_add_(0, tokens, expert(x[tokens]) * flat_weights[slots].unsqueeze(1))
        return out


class FlatCopied(MaskLoop):
    """Rows are copied to their slots by index."""

    def moe(self, x, ids, weights):
        flat = ids.view(-1)
        rows = x.repeat_interleave(self.top_k, dim=0)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            slots = torch.where(flat == e)[0]
            y.index_copy_(0, slots, expert(rows[slots]))
        return (y.view(*ids.shape, D) * weights.unsqueeze(-1)).sum(dim=1)


class PairedSlots(MaskLoop):
    """The slots in two dims, [T, K, D], whose rows pairs of positions name."""

    def moe(self, x, ids, weights):
        y = x.new_empty(*ids.shape, D)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            y[tokens, slots] = expert(x[tokens])
        return (y * weights.unsqueeze(-1)).sum(dim=1)


class PairedSlotsWeighted(MaskLoop):
    """The same from a mask that has the slots first; rows are weighted as they are written."""

    def moe(self, x, ids, weights):
        y = torch.zeros(*ids.shape, D, dtype=x.dtype, device=x.device)
        mask = torch.nn.functional.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slots, tokens = torch.where(mask[e])
            y[tokens, slots, :] = expert(x[tokens]) * weights[tokens, slots].unsqueeze(-1)
        return y.sum(dim=1)


CASES = (
    Case("flat_weighted_inside", FlatWeightedInside),
    Case("flat_weighted_in_place", FlatWeightedInPlace),
    Case("flat_to_tokens", FlatToTokens),
    Case("flat_copied", FlatCopied),
    Case("flat_paired", PairedSlots),
    Case("flat_paired_weighted", PairedSlotsWeighted),
)
