"""Almost a Mixture of Experts whose experts are modules that compute every token."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E, K, SwiGLU
from tests.zoo.dense_modules import (
    AddedInPlace,
    Dense,
    FilledLate,
    GatheredOutputs,
    MaskedWeights,
    StackedEinsum,
    SumOfProducts,
    Where,
)
from tests.zoo.masks import MaskLoop


class Soft(SumOfProducts):
    """Every expert counts for every token."""

    def table(self, logits):
        return F.softmax(logits, dim=-1)


class SoftStacked(StackedEinsum):
    """The same, by einsum."""

    def table(self, logits):
        return F.softmax(logits, dim=-1)


class SoftmaxOverTokens(SumOfProducts):
    """-inf outside the top-k, but tokens compete for an expert: where none chose it, it is NaN, not zero."""

    def table(self, logits):
        values, ids = logits.topk(K, dim=-1)
        return torch.full_like(logits, -30.0).scatter(-1, ids, values).softmax(dim=1)


class NormalizedOverTokens(SumOfProducts):
    """One token's NaN is then everybody's."""

    def table(self, logits):
        return F.normalize(super().table(logits), p=1, dim=1)


class Threshold(SumOfProducts):
    """All experts at least as good as the K-th: with ties more than K."""

    def table(self, logits):
        probs = F.softmax(logits, dim=-1)
        return probs * (probs >= probs.topk(K, dim=-1).values[..., -1:])


class RepeatedIds(SumOfProducts):
    """Two choices may be the same expert: a table has it once."""

    def table(self, logits):
        return torch.zeros_like(logits).scatter(-1, logits.topk(K, dim=-1).indices // 2, 0.5)


class OneLeftOut(Dense):
    """The first expert is never asked."""

    def add_up(self, x, table):
        return sum(table[..., e : e + 1] * self.experts[e](x) for e in range(1, E))


class OneTwice(Dense):
    """The first expert counts twice."""

    def add_up(self, x, table):
        return sum(table[..., e : e + 1] * self.experts[e](x) for e in (0, *range(E)))


class OneOfAnotherKind(SumOfProducts):
    """The last expert has another activation."""

    def __init__(self):
        super().__init__()
        self.experts[-1].act_fn = nn.GELU()


class TiedExperts(SumOfProducts):
    """Two experts share a matrix."""

    def __init__(self):
        super().__init__()
        self.experts[1].w2.weight = self.experts[0].w2.weight


class MixesTokens(SwiGLU):
    """An expert sees the mean over the sequence."""

    def forward(self, x):
        return super().forward(x - x.mean(dim=1, keepdim=True))


class SoftmaxOverSequence(SwiGLU):
    """A softmax over the sequence, counted from the front."""

    def forward(self, x):
        return super().forward(torch.softmax(x, dim=1))


class Dropped(SwiGLU):
    """Dropout in training."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class BalanceLoss(Dense):
    """What all experts computed is used once more."""

    def add_up(self, x, table):
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return torch.einsum("bse,bsed->bsd", table, outputs) * outputs.square().mean()


class ReadBetween(AddedInPlace):
    """Half of the sum is used."""

    def add_up(self, x, table):
        out, seen = torch.zeros_like(x), []
        for e, expert in enumerate(self.experts):
            out += table[..., e, None] * expert(x)
            seen.append(out.mean())
        return out * seen[1]


class FirstFeatures(GatheredOutputs):
    """Only the first features of the chosen outputs are gathered; the others repeat them."""

    def forward(self, x):
        weights, ids = self.gate(x).topk(K, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        chosen = outputs.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, D // 2))
        return (chosen * weights.unsqueeze(-1)).sum(dim=2).repeat(1, 1, 2)


class Cascade(Dense):
    """Each expert sees what the ones before it made of the tokens."""

    def add_up(self, x, table):
        for e, expert in enumerate(self.experts):
            x = x + table[..., e : e + 1] * expert(x)
        return x


class WeightsWritten(MaskedWeights):
    """The weights change after an expert's share was computed from them, and before it is used."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        weights = weights * 1.0
        columns = [(weights * (ids == e)).sum(dim=-1, keepdim=True) for e in range(E)]
        weights.mul_(2.0)
        out = sum(columns[e] * expert(x) for e, expert in enumerate(self.experts))
        return (out * weights.sum(dim=-1, keepdim=True)).view_as(hidden_states)


class FilledThenLifted(FilledLate):
    """Once the table is filled every expert gets a share."""

    def fill(self, table, ids, weights, outputs):
        return super().fill(table, ids, weights, outputs).add_(0.1)


class FilledThenForgotten(FilledLate):
    """The ids are others once the table is filled."""

    def fill(self, table, ids, weights, outputs):
        ids = ids.clone()
        table = super().fill(table, ids, weights.detach(), outputs)
        ids.zero_()
        return table


class FilledAfterReading(FilledLate):
    """The outputs are scaled by the table while it is empty, too."""

    def fill(self, table, ids, weights, outputs):
        outputs += table.unsqueeze(-1)
        early = outputs * (1 - table.unsqueeze(-1))
        table = super().fill(table, ids, weights, outputs)
        outputs += early
        return table


class FilledTwice(FilledLate):
    """Halved when the first expert's share has been read."""

    def fill(self, table, ids, weights, outputs):
        table = super().fill(table, ids, weights, outputs)
        outputs[..., 0, :] += table[..., :1]
        return table.mul_(0.5)


class WhereRepeated(Where):
    """Two choices may be the same expert, whose scores count once."""

    def add_up(self, x, scores, ids):
        return super().add_up(x, scores, ids // 2)


class WhereLeftOut(Where):
    """The first expert's tokens get nothing of it."""

    def add_up(self, x, scores, ids):
        return sum(
            torch.where((ids == e).any(dim=-1, keepdim=True), self.experts[e](x) * scores[..., e : e + 1], 0)
            for e in range(1, E)
        )


class WhereOfAnother(Where):
    """What is kept of an expert are the tokens of the next."""

    def add_up(self, x, scores, ids):
        return sum(
            torch.where((ids == (e + 1) % E).any(dim=-1, keepdim=True), expert(x) * scores[..., e : e + 1], 0)
            for e, expert in enumerate(self.experts)
        )


class WhereOtherwise(Where):
    """What isn't kept is not zero."""

    def add_up(self, x, scores, ids):
        return sum(
            torch.where((ids == e).any(dim=-1, keepdim=True), expert(x) * scores[..., e : e + 1], 0.01)
            for e, expert in enumerate(self.experts)
        )


class WhereUnchosen(Where):
    """What is kept are the tokens that did not choose the expert."""

    def add_up(self, x, scores, ids):
        return sum(
            torch.where((ids == e).any(dim=-1, keepdim=True), 0, expert(x) * scores[..., e : e + 1])
            for e, expert in enumerate(self.experts)
        )


class WhereWritten(Where):
    """The scores change after an expert's share was computed, and before it is used."""

    def add_up(self, x, scores, ids):
        scores = scores * 1.0
        columns = [torch.where((ids == e).any(dim=-1, keepdim=True), scores[..., e : e + 1], 0) for e in range(E)]
        scores.mul_(2.0)
        out = sum(columns[e] * expert(x) for e, expert in enumerate(self.experts))
        return out * scores.sum(dim=-1, keepdim=True)


def block(expert):
    return lambda: SumOfProducts(expert)


class BesideNumbers(SumOfProducts):
    """Each expert reads integers beside its rows: they have a row for each token, but none for each slot."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(SwiGLU(width=D + 1) for _ in range(E))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        positions = torch.arange(x.shape[0])[:, None] % 3
        table = self.table(self.gate(x))
        return sum(table[:, e, None] * self.experts[e](torch.cat([x, positions], -1)) for e in range(E))


class OneHotOfTokens(MaskLoop):
    """One-hot rows summed over tokens: every token has the same table."""

    def moe(self, x, ids, weights):
        table = (F.one_hot(ids, self.num_experts).to(x.dtype) * weights.unsqueeze(-1)).sum(0, keepdim=True).sum(-2)
        return sum(table[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


class OneHotPlusOne(MaskLoop):
    """One-hot rows to which a number was added."""

    def moe(self, x, ids, weights):
        table = ((F.one_hot(ids, self.num_experts) + 0.1) * weights.unsqueeze(-1)).sum(-2)
        return sum(table[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


class OneHotSpread(MaskLoop):
    """An einsum that gives every expert the sum of the others."""

    def moe(self, x, ids, weights):
        one_hot = F.one_hot(ids, self.num_experts).to(x.dtype)
        spread = 1 - torch.eye(self.num_experts)
        table = torch.einsum("tkf,tk,fe->te", one_hot, weights, spread)
        return sum(table[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


MISSES = (
    NearMiss("dense_modules_soft", "weights_are_zero_outside_the_top_k", Soft),
    NearMiss("dense_modules_soft_stacked", "weights_are_zero_outside_the_top_k", SoftStacked),
    NearMiss("dense_modules_softmax_over_tokens", "weights_are_zero_outside_the_top_k", SoftmaxOverTokens),
    NearMiss("dense_modules_normalized_over_tokens", "weights_are_zero_outside_the_top_k", NormalizedOverTokens),
    NearMiss("dense_modules_threshold", "weights_are_zero_outside_the_top_k", Threshold),
    NearMiss("dense_modules_repeated_ids", "repeated_ids_are_counted", RepeatedIds),
    NearMiss("dense_modules_one_left_out", "every_expert_is_covered", OneLeftOut),
    NearMiss("dense_modules_one_twice", "every_expert_is_covered", OneTwice),
    NearMiss("dense_modules_one_of_another_kind", "bodies_are_isomorphic", OneOfAnotherKind),
    NearMiss("dense_modules_tied", "bodies_are_isomorphic", TiedExperts),
    NearMiss("dense_modules_mixes_tokens", "body_is_row_wise", block(MixesTokens)),
    NearMiss("dense_modules_softmax_over_sequence", "body_is_row_wise", block(SoftmaxOverSequence)),
    NearMiss("dense_modules_dropout", "body_is_row_wise", block(Dropped)),
    NearMiss("dense_modules_beside_numbers", "body_is_row_wise", BesideNumbers),
    NearMiss("dense_modules_balance_loss", "no_intermediate_escapes", BalanceLoss),
    NearMiss("dense_modules_read_between", "no_intermediate_escapes", ReadBetween),
    NearMiss("dense_modules_first_features", "slots_of_a_token_are_summed", FirstFeatures),
    NearMiss("dense_modules_cascade", "bodies_are_isomorphic", Cascade),
    NearMiss("dense_modules_where_repeated", "repeated_ids_are_counted", WhereRepeated),
    NearMiss("dense_modules_where_left_out", "every_expert_is_covered", WhereLeftOut),
    NearMiss("dense_modules_where_of_another", "every_expert_is_covered", WhereOfAnother),
    NearMiss("dense_modules_filled_then_lifted", "weights_are_zero_outside_the_top_k", FilledThenLifted),
    NearMiss("dense_modules_filled_then_forgotten", "weights_are_zero_outside_the_top_k", FilledThenForgotten),
    NearMiss("dense_modules_filled_after_reading", "weights_are_zero_outside_the_top_k", FilledAfterReading),
    NearMiss("dense_modules_filled_twice", "weights_are_zero_outside_the_top_k", FilledTwice),
    NearMiss("dense_modules_where_otherwise", "weights_are_zero_outside_the_top_k", WhereOtherwise),
    NearMiss("dense_modules_where_unchosen", "every_expert_is_covered", WhereUnchosen),
    NearMiss("dense_modules_where_written", "nothing_is_written_inside", WhereWritten),
    NearMiss("dense_modules_weights_written", "nothing_is_written_inside", WeightsWritten),
    NearMiss("dense_modules_one_hot_of_tokens", "weights_are_zero_outside_the_top_k", OneHotOfTokens),
    NearMiss("dense_modules_one_hot_plus_one", "weights_are_zero_outside_the_top_k", OneHotPlusOne),
    NearMiss("dense_modules_one_hot_spread", "weights_are_zero_outside_the_top_k", OneHotSpread),
)
