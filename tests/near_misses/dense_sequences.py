"""Almost a Mixture of Experts that computes every expert on every token of a batch of sequences at once."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E, K
from tests.zoo.dense_sequences import CutBeforeSum, SequenceExperts


class Soft(SequenceExperts):
    """Every expert counts for every token."""

    def table(self, logits):
        return F.softmax(logits, dim=-1)


class SoftmaxOverSequence(SequenceExperts):
    """-inf outside the top-k, and tokens of a sequence compete for an expert."""

    def table(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return torch.full_like(logits, -30.0).scatter(-1, ids, values).softmax(dim=1)


class RepeatedIds(SequenceExperts):
    """Two choices may be the same expert: a table has it once."""

    def table(self, logits):
        return torch.zeros_like(logits).scatter(-1, logits.topk(K, dim=-1).indices // 2, 0.5)


class SummedOverSequence(SequenceExperts):
    """What is summed are a sequence's tokens, for each of which one expert is left."""

    def add_up(self, y, table):
        return (y * table.unsqueeze(-1)).sum(dim=1).repeat(1, 12 // E, 1)


class MeanOverSequence(SequenceExperts):
    """An expert sees the mean over the sequence."""

    def activate(self, h):
        return super().activate(h - h.mean(dim=1, keepdim=True))


class SoftmaxOverExperts(SequenceExperts):
    """A feature of an expert depends on that of the others."""

    def activate(self, h):
        return super().activate(h.softmax(dim=2))


class OneLeftOut(SequenceExperts):
    """The first expert's share is missing."""

    def add_up(self, y, table):
        return super().add_up(y[:, :, 1:], table[:, :, 1:])


class CutAsSequences(CutBeforeSum):
    """Tokens are cut as if the sequence came first."""

    def forward(self, hidden_states):
        return super().forward(hidden_states.unflatten(1, (-1, 2)).flatten(0, 1)).view(hidden_states.shape)

    def weigh(self, y, table, batch_size):
        return super().weigh(y, table, batch_size // 3)


class CutTableAsItLies(CutBeforeSum):
    """The table is cut without being transposed first."""

    def weigh(self, y, table, batch_size):
        return y.view(E, batch_size, -1, D) * table.reshape(E, batch_size, -1)[..., None]


class CutAndTurned(CutBeforeSum):
    """The batch's weights are turned around."""

    def weigh(self, y, table, batch_size):
        return y.view(E, batch_size, -1, D) * table.t().reshape(E, batch_size, -1).flip(1)[..., None]


TOP_K, ROWS = "weights_are_zero_outside_the_top_k", "body_is_row_wise"

MISSES = (
    NearMiss("dense_sequences_soft", TOP_K, Soft),
    NearMiss("dense_sequences_softmax_over_sequence", TOP_K, SoftmaxOverSequence),
    NearMiss("dense_sequences_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("dense_sequences_summed_over_sequence", "slots_of_a_token_are_summed", SummedOverSequence),
    NearMiss("dense_sequences_mean_over_sequence", ROWS, MeanOverSequence),
    NearMiss("dense_sequences_softmax_over_experts", ROWS, SoftmaxOverExperts),
    NearMiss("dense_sequences_one_left_out", ROWS, OneLeftOut),
    NearMiss("dense_sequences_cut_as_sequences", "rows_belong_to_tokens", CutAsSequences),
    NearMiss("dense_sequences_cut_as_it_lies", ROWS, CutTableAsItLies),
    NearMiss("dense_sequences_cut_and_turned", ROWS, CutAndTurned),
)
