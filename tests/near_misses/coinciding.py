"""As many slots as features: numbers of tokens that are repeated along the rows look like those along the columns."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import Block, D


class Square(Block):
    """Segments of sorted slots; a near miss changes how rows are taken or put back."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)[: D // self.top_k]
        _, ids, weights = self.route(x)
        order = ids.view(-1).argsort()
        tokens, counts = order // self.top_k, ids.view(-1).bincount(minlength=self.num_experts).tolist()
        parts = zip(self.experts, self.taken(x, tokens).split(counts), strict=True)
        rows = torch.cat([expert(part) for expert, part in parts])
        return self.put_back(torch.zeros_like(x), tokens, rows * weights.view(-1)[order].unsqueeze(-1))

    def taken(self, x, tokens):
        return x[tokens]

    def put_back(self, out, tokens, rows):
        return out.index_add(0, tokens, rows)


class TakenByColumn(Square):
    """Each column of the rows is that of another token."""

    def taken(self, x, tokens):
        return x.gather(0, tokens.repeat(D, 1))


class PutByColumn(Square):
    """Each column goes to another token."""

    def put_back(self, out, tokens, rows):
        return out.scatter_add(0, tokens.expand(D, D), rows)


MISSES = (
    NearMiss("segments_taken_by_column", None, TakenByColumn, may_rewrite=True),
    NearMiss("segments_put_by_column", None, PutByColumn, may_rewrite=True),
)
