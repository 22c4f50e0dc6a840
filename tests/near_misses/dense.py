"""Almost a Mixture of Experts that computes every expert on every token."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E, K
from tests.zoo.dense import (
    AddedByNumber,
    DenseBlock,
    DenseExperts,
    MaskedSoftmax,
    PickedByNumber,
    ScatteredSigmoid,
    TransposedExperts,
    TransposedSigmoid,
    WeightedInputs,
)


class SoftMixture(DenseBlock):
    """Every expert counts for every token."""

    def table(self, logits):
        return F.softmax(logits, dim=-1)


class Threshold(DenseBlock):
    """All experts at least as good as the K-th: with ties more than K."""

    def table(self, logits):
        probs = F.softmax(logits, dim=-1)
        return probs * (probs >= probs.topk(K, dim=-1).values[:, -1:])


class LeakyTable(DenseBlock):
    """A tenth of the weight goes to all."""

    def table(self, logits):
        return super().table(logits) * 0.9 + 0.1 / E


class ScatteredTwice(DenseBlock):
    """The best and the worst are chosen, one after the other, in one table."""

    def table(self, logits):
        table = torch.zeros_like(logits)
        best = table.scatter_(1, logits.topk(K, dim=-1).indices, 0.5)
        table.scatter_(1, logits.topk(1, dim=-1, largest=False).indices, 0.5)
        return best


class FiniteMask(MaskedSoftmax):
    """What was not chosen is less likely, not impossible."""

    def table(self, logits):
        _, ids = logits.topk(K, dim=-1)
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
        return F.softmax(logits.masked_fill(~mask, -5.0), dim=-1)


class SigmoidOfZeros(ScatteredSigmoid):
    """The sigmoid of what was not chosen is one half."""

    def table(self, logits):
        values, ids = torch.topk(logits, K, dim=1)
        return torch.sigmoid(torch.zeros_like(logits).scatter(1, ids, values))


class OneWeightForAll(DenseBlock):
    """A column of one entry, which is chosen, times what every expert has."""

    def table(self, logits):
        best = logits.max(dim=-1, keepdim=True).values
        chosen = torch.zeros_like(best).scatter(1, best.topk(1, dim=-1).indices, 1.0)
        return F.softmax(logits, dim=-1) * chosen


class TransposedSoftmax(TransposedSigmoid):
    """The softmax of a transposed table over the tokens: a sum of experts, but weighted by what others have."""

    def table(self, logits):
        values, ids = torch.topk(logits, K, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values).transpose(0, 1)
        return F.softmax(scores, dim=-1)


class AddedToNextToken(AddedByNumber):
    """What an expert makes of a token is added to its neighbour."""

    def put_back(self, y, x):
        return self.start(x).scatter_add_(0, (self.numbers(x) + 1) % len(x), y.view(-1, D))


class AddedByExpert(AddedByNumber):
    """Numbers that are repeated one by one, beside rows that lie expert by expert."""

    def put_back(self, y, x):
        tokens = torch.arange(len(x), device=x.device).repeat_interleave(E)
        return self.start(x).index_add_(0, tokens, y.view(-1, D))


class AddedInPart(AddedByNumber):
    """The last columns are left out."""

    def put_back(self, y, x):
        return self.start(x).scatter_add_(0, self.numbers(x)[:, :-1], y.view(-1, D)[:, :-1])


class AddedToPart(AddedByNumber):
    """What is added to is a part of a tensor that is read afterwards."""

    def put_back(self, y, x):
        whole = F.silu(torch.cat((x, x)))
        whole[: len(x)].scatter_add_(0, self.numbers(x), y.view(-1, D))
        return whole.view(2, -1, D).sum(dim=0)


class StartRead(AddedByNumber):
    """What is added to is read before it is added to."""

    def put_back(self, y, x):
        start = self.start(x)
        seen = start.mean(dim=0)
        return start.scatter_add_(0, self.numbers(x), y.view(-1, D)) + seen


class StartDepends(AddedByNumber):
    """The rows are added to something that is made of them."""

    def put_back(self, y, x):
        start = F.silu(y.mean(dim=0))
        return start.scatter_add_(0, self.numbers(x), y.view(-1, D))


class NumbersWritten(PickedByNumber):
    """The tokens' numbers are written to once they were made."""

    def numbers(self, x):
        numbers = torch.arange(len(x), device=x.device)
        numbers[0] = 1
        return numbers.repeat(E)


class DividedByTable(DenseBlock):
    """Divided, in place, by what could be zero where nothing was chosen."""

    def table(self, logits):
        weights, ids = logits.softmax(dim=-1).topk(K, dim=-1)
        table = torch.zeros_like(logits).scatter(1, ids, weights)
        table.div_(logits.sigmoid())
        return table


class RepeatedIds(DenseBlock):
    """Two choices may be the same expert: a table has it once."""

    def table(self, logits):
        ids = logits.topk(K, dim=-1).indices // 2
        return torch.zeros_like(logits).scatter(1, ids, 0.5)


class BiasedInputs(WeightedInputs):
    """With biases an expert that is given zeros does not give zeros."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(E, D))

    def forward(self, x, table):
        rows = x.repeat(E, 1) * table.transpose(0, 1).reshape(-1, 1)
        h = self.activate(torch.bmm(rows.view(E, -1, D), self.gate_up_proj))
        return (torch.bmm(h, self.down_proj) + self.bias[:, None]).sum(dim=0)


class HiddenReturned(DenseExperts):
    """What the experts computed is used for a loss."""

    def activate(self, h):
        self.seen = h.square().mean(dim=(1, 2))
        return super().activate(h)

    def forward(self, x, table):
        y = super().forward(x, table)
        return y + self.__dict__.pop("seen").unsqueeze(-1)


class MeanOverExperts(DenseExperts):
    """Experts are compared before they are weighted."""

    def add_up(self, y, table):
        return super().add_up(y - y.mean(dim=1, keepdim=True), table)


class NormAsWideAsExperts(TransposedExperts):
    """A norm's weight has as many entries as there are experts: it belongs to the features all the same."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * E, D))
        self.down_proj = nn.Parameter(torch.empty(E, E, D))
        self.norm = nn.Parameter(torch.empty(E))

    def activate(self, h):
        return F.rms_norm(super().activate(h), (E,), self.norm)


class OneColumnRepeated(DenseExperts):
    """An einsum that repeats one column of the rows for all that it sums over."""

    def activate(self, h):
        return super().activate(h)[..., :1]


def block(experts):
    return lambda: DenseBlock(experts)


def transposed(experts):
    return lambda: TransposedSigmoid(experts)


def numbered(router):
    return lambda: router(AddedByNumber)


MISSES = (
    NearMiss("dense_all_soft", "weights_are_zero_outside_the_top_k", SoftMixture),
    NearMiss("dense_all_threshold", "weights_are_zero_outside_the_top_k", Threshold),
    NearMiss("dense_all_leaky", "weights_are_zero_outside_the_top_k", LeakyTable),
    NearMiss("dense_all_scattered_twice", "weights_are_zero_outside_the_top_k", ScatteredTwice),
    NearMiss("dense_all_finite_mask", "weights_are_zero_outside_the_top_k", FiniteMask),
    NearMiss("dense_all_sigmoid_of_zeros", "weights_are_zero_outside_the_top_k", SigmoidOfZeros),
    NearMiss("dense_all_one_weight_for_all", "weights_are_zero_outside_the_top_k", OneWeightForAll),
    NearMiss("dense_all_transposed_softmax", "weights_are_zero_outside_the_top_k", numbered(TransposedSoftmax)),
    NearMiss("dense_all_added_to_next_token", "slots_of_a_token_are_summed", transposed(AddedToNextToken)),
    NearMiss("dense_all_added_by_expert", "slots_of_a_token_are_summed", transposed(AddedByExpert)),
    NearMiss("dense_all_added_in_part", "slots_of_a_token_are_summed", transposed(AddedInPart)),
    NearMiss("dense_all_added_to_part", "nothing_is_written_inside", transposed(AddedToPart)),
    NearMiss("dense_all_start_read", "nothing_is_written_inside", transposed(StartRead)),
    NearMiss("dense_all_start_depends", "body_is_row_wise", transposed(StartDepends)),
    NearMiss("dense_all_numbers_written", "body_is_row_wise", transposed(NumbersWritten)),
    NearMiss("dense_all_divided", "weights_are_zero_outside_the_top_k", DividedByTable, may_rewrite=True),
    NearMiss("dense_all_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("dense_all_biased_inputs", "weights_are_zero_outside_the_top_k", lambda: ScatteredSigmoid(BiasedInputs)),
    NearMiss("dense_all_one_column_repeated", "body_is_row_wise", block(OneColumnRepeated)),
    NearMiss("dense_all_hidden_used", "body_is_row_wise", block(HiddenReturned)),
    NearMiss("dense_all_mean_over_experts", "body_is_row_wise", block(MeanOverExperts)),
    NearMiss("dense_all_norm_as_wide_as_experts", None, block(NormAsWideAsExperts), may_rewrite=True),
)
