"""Tokens in two dims: positions and masks that name other tokens than they seem to."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, K
from tests.zoo.sequences import SequenceLoop


class TransposedMask(SequenceLoop):
    """The rows come sequence by sequence, the weights batch by batch."""

    def moe(self, x, ids, weights):
        out, other_x = torch.zeros_like(x), x.transpose(0, 1)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            weight = (weights * (ids == e)).sum(-1)[mask].unsqueeze(-1)
            out[mask] += expert(other_x[mask.t()]) * weight
        return out


class SwappedPositions(SequenceLoop):
    """Positions of the transposed mask, put back in order: the same tokens in another order than the weights'."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            s, b = torch.where(mask.t())
            weight = (weights * (ids == e)).sum(-1)[mask].unsqueeze(-1)
            out[b, s] += expert(x[b, s]) * weight
        return out


class PositionsOfTwoMasks(SequenceLoop):
    """The sequence of one expert's token with the place of another's."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s, k = torch.where(ids == e)
            other, _, _ = torch.where(ids.flip(0) == e)
            out[other, s] += expert(x[b, s]) * weights[b, s, k].unsqueeze(-1)
        return out


class FlatRowsOfATransposed(SequenceLoop):
    """A flat mask on tokens that were flattened the other way round."""

    def moe(self, x, ids, weights):
        out, flat = torch.zeros_like(x), x.transpose(0, 1).reshape(-1, D)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            weight = (weights * (ids == e)).sum(-1)[mask].unsqueeze(-1)
            out[mask] += expert(flat[mask.view(-1)]) * weight
        return out


class SequenceIdsRepeat(SequenceLoop):
    """A token may have an expert twice, and its row is added once."""

    def moe(self, x, ids, weights):
        ids = ids.clamp(max=self.num_experts - 3)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            out[mask] += expert(x[mask])
        return out * weights.sum(-1, keepdim=True)


class SequenceAnyOfAll(SequenceLoop):
    """One token's choice sends its whole sequence to the expert."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1).any(-1)
            out[mask] += expert(x[mask]) * weights[mask].sum(-1, keepdim=True)
        return out


class SequenceScale(SequenceLoop):
    """A factor for each token, [B, S], beside the weights."""

    def moe(self, x, ids, weights):
        out, scale = torch.zeros_like(x), x.sum(-1).sigmoid()
        for e, expert in enumerate(self.experts):
            b, s, k = torch.where(ids == e)
            out[b, s] += expert(x[b, s]) * weights[b, s, k].unsqueeze(-1) * scale[b, s].unsqueeze(-1)
        return out


class OutputSeenThroughItsBase(SequenceLoop):
    """The zeros of which the output is a view are read under their own name."""

    def moe(self, x, ids, weights):
        base = torch.zeros_like(x)
        out, flat, flat_ids, weights = base.view(-1, D), x.view(-1, D), ids.view(-1, K), weights.view(-1, K)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(flat_ids == e)
            out.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return base * 2


class FlatColumnLoop(SequenceLoop):
    """The plainest loop over flattened columns, in steps of which a near miss replaces one."""

    def column(self, ids, k):
        return ids[..., k].reshape(-1)

    def weight(self, weights, k):
        return weights[..., k].reshape(-1)

    def moe(self, x, ids, weights):
        flat = x.reshape(-1, D)
        out = torch.zeros_like(flat)
        for k in range(self.top_k):
            column, weight = self.column(ids, k), self.weight(weights, k)
            for e, expert in enumerate(self.experts):
                mask = column == e
                out[mask] += weight[mask].unsqueeze(-1) * expert(flat[mask])
        return out.view_as(x)


class FlatWeightsOfATransposed(FlatColumnLoop):
    """The weights are flattened the other way round."""

    def weight(self, weights, k):
        return weights[..., k].t().reshape(-1)


class FlatWeightsOfAnotherColumn(FlatColumnLoop):
    def weight(self, weights, k):
        return weights[..., self.top_k - 1 - k].reshape(-1)


class FlatColumnWritten(FlatColumnLoop):
    """Some tokens are sent to the first expert once the column was taken."""

    def moe(self, x, ids, weights):
        return super().moe(x, ids.clone(), weights)

    def column(self, ids, k):
        column = ids[..., k].reshape(-1)
        column[:4] = 0
        return column


class FlatColumnOfOneTwice(FlatColumnLoop):
    """The first column stands for all."""

    def column(self, ids, k):
        return ids[..., 0].reshape(-1)


class FlatColumnOfATransposed(FlatColumnLoop):
    """The ids come sequence by sequence, the tokens batch by batch."""

    def column(self, ids, k):
        return ids.transpose(0, 1)[..., k].reshape(-1)


MISSES = (
    NearMiss("sequence_transposed_mask", "bodies_are_isomorphic", TransposedMask),
    NearMiss("sequence_swapped_positions", "bodies_are_isomorphic", SwappedPositions),
    NearMiss("sequence_positions_of_two", "loop_has_a_known_form", PositionsOfTwoMasks),
    NearMiss("sequence_flat_transposed", "rows_belong_to_tokens", FlatRowsOfATransposed, may_rewrite=True),
    NearMiss("sequence_ids_repeat", "repeated_ids_are_counted", SequenceIdsRepeat),
    NearMiss("sequence_any_of_all", "loop_has_a_known_form", SequenceAnyOfAll),
    NearMiss("sequence_scale", "rows_belong_to_tokens", SequenceScale, may_rewrite=True),
    NearMiss("sequence_seen_through_base", "accumulator_may_be_added_to", OutputSeenThroughItsBase),
    NearMiss("sequence_flat_weights_transposed", "bodies_are_isomorphic", FlatWeightsOfATransposed),
    NearMiss("sequence_flat_weights_of_another", "bodies_are_isomorphic", FlatWeightsOfAnotherColumn),
    NearMiss("sequence_flat_column_written", "nothing_is_written_inside", FlatColumnWritten),
    NearMiss("sequence_flat_column_twice", "every_expert_is_covered", FlatColumnOfOneTwice),
    NearMiss("sequence_flat_column_transposed", "one_routing_selects_all_rows", FlatColumnOfATransposed),
)
