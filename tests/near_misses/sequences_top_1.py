"""One expert a token in two dims, almost."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import K
from tests.zoo.sequences_top_1 import SequenceTopOne


class TwoChoices(SequenceTopOne):
    """Tokens have two experts, of which the later one's row is kept."""

    def moe(self, x, ids, weights, probs):
        ids, out = probs.topk(K, dim=-1).indices, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] = expert(x[mask])
        return out


class WeightOfTheSequence(SequenceTopOne):
    """The weight of the sequence's first token."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s = torch.where(ids == e)
            out[b, s] += weights[b, :1] * expert(x[b, s])
        return out


class PositionsSwapped(SequenceTopOne):
    """Weights of other positions than the rows': those of the transposed mask."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            s, b = torch.where(mask.t())
            out[mask] = expert(x[mask]) * weights[b, s].unsqueeze(-1)
        return out


class NextProbability(SequenceTopOne):
    """The column of the next expert."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask, other = ids == e, (e + 1) % self.num_experts
            out[mask] = expert(x[mask]) * probs[mask][:, other : other + 1]
        return out


class FirstExpertTwice(SequenceTopOne):
    """The first expert adds its rows twice."""

    def moe(self, x, ids, weights, probs):
        out = torch.zeros_like(x)
        for e in (0, *range(self.num_experts)):
            mask = ids == e
            out[mask] += self.experts[e](x[mask]) * weights[mask].unsqueeze(-1)
        return out


class WrittenBetween(SequenceTopOne):
    """The weights are halved between two experts."""

    def moe(self, x, ids, weights, probs):
        out, weights = torch.zeros_like(x), weights.detach().clone()
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * weights[mask].unsqueeze(-1)
            weights.mul_(0.5)
        return out


class ChoiceByPlace(SequenceTopOne):
    """Ids by place in the sequence, not by token: they have no dim of the batch."""

    def moe(self, x, ids, weights, probs):
        ids, out = probs.mean(0).argmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[:, mask] = expert(x[:, mask])
        return out


MISSES = (
    NearMiss("sequence_top_1_two_choices", "assignments_overwrite_nothing", TwoChoices),
    NearMiss("sequence_top_1_of_the_sequence", "bodies_are_isomorphic", WeightOfTheSequence),
    NearMiss("sequence_top_1_swapped", "bodies_are_isomorphic", PositionsSwapped),
    NearMiss("sequence_top_1_next_probability", "bodies_are_isomorphic", NextProbability),
    NearMiss("sequence_top_1_twice", "every_expert_is_covered", FirstExpertTwice),
    NearMiss("sequence_top_1_written", "nothing_is_written_inside", WrittenBetween),
    NearMiss("sequence_top_1_by_place", "loop_has_a_known_form", ChoiceByPlace),
)
