"""Loops that take an expert's tokens first, and then find the expert among the ids of these."""

import torch

from tests.zoo.case import Case
from tests.zoo.masks import MaskLoop
from tests.zoo.sequences import SequenceLoop


class OwnMaskedSum(MaskLoop):
    """The ids of the expert's tokens are compared again; their weights as a masked sum over the slots."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            if rows.any():
                chosen = ids[rows] == e
                out[rows] += expert(x[rows]) * (weights[rows] * chosen).sum(dim=-1, keepdim=True)
        return out


class OwnMaskRows(MaskLoop):
    """Rows of the mask itself, and of weights that were masked before."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            tokens = chosen.any(dim=-1).nonzero(as_tuple=True)[0]
            if tokens.numel() == 0:
                continue
            out.index_add_(0, tokens, expert(x[tokens]) * (weights * chosen)[tokens].sum(-1, keepdim=True))
        return out


class OwnMaskFactor(MaskLoop):
    """The mask's rows times those of the weights."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            weight = (chosen[rows].to(weights.dtype) * weights[rows]).sum(dim=-1)
            out[rows] = out[rows] + weight.unsqueeze(-1) * expert(x[rows])
        return out


class OwnPicked(SequenceLoop):
    """Of the weights of a sequence's tokens those where the ids are the expert's."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            if rows.any():
                own = weights[rows][ids[rows] == e]
                out[rows] += expert(x[rows]) * own.unsqueeze(-1)
        return out


class OwnNumbers(MaskLoop):
    """The tokens' numbers from a list of all, their slots where the expert stands among their ids."""

    def moe(self, x, ids, weights):
        out, numbers = torch.zeros_like(x), torch.arange(x.shape[0], device=x.device)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            tokens = numbers[rows]
            if tokens.numel() == 0:
                continue
            slots = (ids[rows] == e).nonzero(as_tuple=True)[1]
            out.index_add_(0, tokens, expert(x[rows]) * weights[rows, slots].unsqueeze(-1))
        return out


class OwnGathered(MaskLoop):
    """The same slots, by which weights are gathered."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            if rows.any():
                slots = (ids[rows] == e).nonzero(as_tuple=True)[1]
                weight = weights[rows].gather(1, slots.unsqueeze(1)).squeeze(1)
                out[rows] += expert(x[rows]) * weight.unsqueeze(1)
        return out


class OwnArgmax(MaskLoop):
    """Slots by argmax, tokens by their positions."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens = (ids == e).any(dim=-1).nonzero().squeeze(-1)
            slots = (ids[tokens] == e).int().argmax(dim=-1)
            out[tokens] += expert(x[tokens]) * weights[tokens].gather(1, slots[:, None])
        return out


class OwnWhere(SequenceLoop):
    """Weights of other experts' slots are replaced by zeros of a tensor."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).any(dim=-1)
            weight = torch.where(ids[rows] == e, weights[rows], torch.zeros_like(weights[rows])).sum(-1)
            out[rows] += expert(x[rows]) * weight[:, None]
        return out


CASES = (
    Case("own_masked_sum", OwnMaskedSum),
    Case("own_mask_rows", OwnMaskRows),
    Case("own_mask_factor", OwnMaskFactor),
    Case("own_picked", OwnPicked),
    Case("own_numbers", OwnNumbers),
    Case("own_gathered", OwnGathered),
    Case("own_argmax", OwnArgmax),
    Case("own_where", OwnWhere),
)
