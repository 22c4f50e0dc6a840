"""Almost a Mixture of Experts with gathered weights."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import FF, D, E, K
from tests.zoo.gathered import BatchedExperts, EinsumExperts, MatmulExperts
from tests.zoo.sorted_slots import SortedBlock


class OtherExpertsDown(EinsumExperts):
    """A slot leaves its expert for the next one half way."""

    def down(self, h, ids):
        return super().down(h, (ids + 1) % E)


class SumOverTokens(MatmulExperts):
    """A token gets the sum of all tokens."""

    def add_up(self, y, weights):
        return (y * weights[..., None]).sum(dim=0).sum(dim=0, keepdim=True).expand(y.size(0), D)


class MeanOverChoices(EinsumExperts):
    """The experts of a token see each other."""

    def down(self, h, ids):
        return super().down(h - h.mean(dim=1, keepdim=True), ids)


class HiddenReturned(EinsumExperts):
    """What the experts computed is used for a loss."""

    def forward(self, x, ids, weights):
        h = self.up(x, ids)
        return self.add_up(self.down(h, ids), weights), h.abs()


class Pair(SortedBlock):
    """The experts return two tensors."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        return self.experts(x, *self.route(x))


class MoreExperts(EinsumExperts):
    """Weights of E + 2 experts, of which the first E are used."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(E + 2, FF, D))


class TokensInTurn(BatchedExperts):
    """Slot n is given token n % T, not n // K."""

    def repeated(self, x):
        return x.repeat(K, 1)


class WrittenAfterRead(BatchedExperts):
    """The bias is added after the gate was read."""

    def up(self, rows, experts):
        h = self.linear(rows, self.gate_up_proj[experts])
        gate = h[:, :FF] * 1.0
        h.add_(self.gate_up_proj_bias[experts])
        return F.silu(gate) * h[:, FF:]


class NumberAddedInPlace(BatchedExperts):
    """A number is added to the product in place: no bias."""

    def up(self, rows, experts):
        h = self.linear(rows, self.gate_up_proj[experts])
        h += 1.0
        return F.silu(h[:, :FF]) * h[:, FF:]


class FrozenDown(EinsumExperts):
    """Some weights are gathered without gradients."""

    def down(self, h, ids):
        with torch.no_grad():
            weight = self.w2[ids]
        return torch.einsum("tao,taio->tai", h, weight)


class OneColumnRepeated(EinsumExperts):
    """An einsum that repeats one column of the rows for all that it sums over."""

    def down(self, h, ids):
        return super().down(h[..., :1], ids)


class WeightsInTurn(BatchedExperts):
    """The weights of slots are those of other slots."""

    def forward(self, x, ids, weights):
        return super().forward(x, ids, weights.t().reshape(-1, K))


class FlatIdsWritten(BatchedExperts):
    """What is written to the flat copy of the ids is not written to the ids."""

    def forward(self, x, ids, weights):
        flat = torch.cat((ids, ids), dim=1)[:, :K].reshape(-1)
        flat.clamp_(max=1)
        rows = self.repeated(x)
        y = self.linear(F.silu(self.linear(rows, self.gate_up_proj[flat])[:, :FF]), self.down_proj[flat])
        return (y * weights.reshape(-1, 1)).view(-1, K, D).sum(dim=1)


def block(experts):
    return lambda: SortedBlock(experts)


MISSES = (
    NearMiss("gathered_other_experts", "body_is_row_wise", block(OtherExpertsDown)),
    NearMiss("gathered_sum_over_tokens", "slots_of_a_token_are_summed", block(SumOverTokens)),
    NearMiss("gathered_mean_over_choices", "body_is_row_wise", block(MeanOverChoices)),
    NearMiss("gathered_hidden_returned", "no_intermediate_escapes", lambda: Pair(HiddenReturned)),
    NearMiss("gathered_more_experts", "every_expert_is_covered", block(MoreExperts)),
    NearMiss("gathered_tokens_in_turn", "body_is_row_wise", block(TokensInTurn)),
    NearMiss("gathered_written_after_read", "nothing_is_written_inside", block(WrittenAfterRead)),
    NearMiss("gathered_number_added_in_place", "nothing_is_written_inside", block(NumberAddedInPlace)),
    NearMiss("gathered_frozen_down", "grad_mode_is_constant", block(FrozenDown)),
    NearMiss("gathered_one_column_repeated", "body_is_row_wise", block(OneColumnRepeated)),
    NearMiss("gathered_flat_ids_written", "nothing_is_written_inside", block(FlatIdsWritten)),
    NearMiss("gathered_weights_in_turn", None, block(WeightsInTurn), may_rewrite=True),
)
