"""Dense experts whose weights or shares are rounded to integers, or masked along another dim than that of tokens."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import Block, D, E
from tests.zoo.dense_modules import SumOfProducts


class RoundedShares(SumOfProducts):
    """What an expert adds is cut off to integers."""

    def add_up(self, x, table):
        return sum((table[..., e, None] * expert(8 * x)).to(torch.int32) for e, expert in enumerate(self.experts)) + 0.0


class RoundedWeights(SumOfProducts):
    """So are the weights."""

    def add_up(self, x, table):
        columns = (8 * table).unbind(dim=-1)
        return sum(columns[e].type(torch.int32).unsqueeze(-1) * expert(x) for e, expert in enumerate(self.experts))


class CountedWeights(SumOfProducts):
    """A weight is one if it isn't zero."""

    def add_up(self, x, table):
        return sum(table[..., e, None].to(torch.bool) * expert(x) for e, expert in enumerate(self.experts))


class OfOneChoice(Block):
    """As many tokens as features, each with one choice."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)[:D]
        scores = F.softmax(self.gate(x), dim=-1)
        weights, ids = scores.max(dim=-1)
        return sum(
            self.share(expert(x), scores[:, e, None], weights, ids == e) for e, expert in enumerate(self.experts)
        )

    def share(self, y, scores, weights, mask):
        """What an expert adds whose outputs are `y`."""
        raise NotImplementedError


class MasksFeatures(OfOneChoice):
    """The mask of the tokens stands along the features of what is added."""

    def share(self, y, scores, weights, mask):
        return torch.where(mask, y * scores, 0)


class MasksOutputs(OfOneChoice):
    """Along those of an expert's outputs."""

    def share(self, y, scores, weights, mask):
        return scores * (y * mask)


class CountsTokens(OfOneChoice):
    """[T, 1] times [T]: each token's weight times the number of the expert's tokens."""

    def share(self, y, scores, weights, mask):
        return (weights.unsqueeze(-1) * mask).sum(dim=-1, keepdim=True) * y


class MasksFeaturesOfSequence(Block):
    """A mask [1, S] beside what is added, [1, S, D], as long as it is wide."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(1, -1, D)[:, :D]
        scores = F.softmax(self.gate(x), dim=-1)
        ids = scores.argmax(dim=-1)
        return sum(
            torch.where(ids == e, expert(x) * scores[..., e, None], 0)
            for e, expert in zip(range(E), self.experts, strict=True)
        )


MISSES = (
    NearMiss("dense_weights_rounded_shares", None, RoundedShares),
    NearMiss("dense_weights_rounded", None, RoundedWeights),
    NearMiss("dense_weights_counted", None, CountedWeights),
    NearMiss("dense_weights_mask_features", None, MasksFeatures),
    NearMiss("dense_weights_mask_outputs", "weights_are_zero_outside_the_top_k", MasksOutputs),
    NearMiss("dense_weights_count_tokens", None, CountsTokens),
    NearMiss("dense_weights_mask_features_of_sequence", None, MasksFeaturesOfSequence),
)
