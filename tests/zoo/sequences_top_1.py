"""One expert a token, and tokens that stay in two dims: ids and weights are [B, S]."""

import torch
from torch.nn import functional as F

from tests.zoo.case import Case
from tests.zoo.common import Block, D


class SequenceTopOne(Block):
    """Ids and weights of the largest probability; subclasses write the loop."""

    def __init__(self):
        super().__init__(top_k=1)

    def forward(self, x):
        probs = F.softmax(self.gate(x), dim=-1)
        weights, ids = probs.max(dim=-1)
        return self.moe(x, ids, weights, probs)


class Assigned(SequenceTopOne):
    """A mask [B, S] picks rows, weights and places."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                out[mask] = expert(x[mask]) * weights[mask].unsqueeze(-1)
        return out


class Added(SequenceTopOne):
    """Pairs of positions, and `+=`."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s = torch.where(ids == e)
            out[b, s] += weights[b, s, None] * expert(x[b, s])
        return out


class OneHotColumns(SequenceTopOne):
    """Columns of a one-hot tensor, tuples of positions, weights that were kept as a column."""

    def moe(self, x, ids, weights, probs):
        chosen = F.one_hot(ids, self.num_experts)
        weights, out = probs.gather(-1, ids.unsqueeze(-1)), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            where = chosen[..., e].nonzero(as_tuple=True)
            if where[0].numel() > 0:
                out[where] = expert(x[where]) * weights[where]
        return out


class KeptDim(SequenceTopOne):
    """topk with K = 1, whose dim goes with each mask; all weights over the whole output."""

    def moe(self, x, ids, weights, probs):
        weights, ids = probs.topk(1, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).squeeze(-1)
            out[mask] = expert(x[mask])
        return out * weights


class OwnProbability(SequenceTopOne):
    """argmax; the expert's column of the probabilities of its tokens."""

    def moe(self, x, ids, weights, probs):
        ids, out = torch.argmax(probs, dim=-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * probs[mask][:, e : e + 1]
        return out


class Flattened(SequenceTopOne):
    """Ids and weights that were squeezed and then flattened."""

    def moe(self, x, ids, weights, probs):
        weights, ids = probs.topk(1, dim=-1)
        flat, ids, weights = x.view(-1, D), ids.squeeze(-1).view(-1), weights.squeeze(-1).view(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            tokens = torch.where(ids == e)[0]
            out.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, None])
        return out.view_as(x)


CASES = (
    Case("sequence_top_1_assigned", Assigned, top_k=1),
    Case("sequence_top_1_added", Added, top_k=1),
    Case("sequence_top_1_one_hot", OneHotColumns, top_k=1),
    Case("sequence_top_1_kept_dim", KeptDim, top_k=1),
    Case("sequence_top_1_own_probability", OwnProbability, top_k=1),
    Case("sequence_top_1_flattened", Flattened, top_k=1),
)
