"""Numbers of the slots' tokens, and copies of their rows, that stand elsewhere than their slots."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class Numbered(MaskLoop):
    """The plainest such loop, in steps of which a near miss replaces one."""

    def numbers(self, count):
        return torch.arange(count).repeat_interleave(self.top_k)

    def rows(self, x, numbers, mask):
        return x[numbers[mask]]

    def weights(self, weights):
        return weights.reshape(-1)

    def moe(self, x, ids, weights):
        flat, flat_weights, out = ids.reshape(-1), self.weights(weights), torch.zeros_like(x)
        numbers = self.numbers(x.shape[0])
        for e, expert in enumerate(self.experts):
            mask = flat == e
            y = expert(self.rows(x, numbers, mask)) * flat_weights[mask, None]
            out.index_add_(0, numbers[mask], y)
        return out


class TiledNumbers(Numbered):
    def numbers(self, count):
        return torch.arange(count).repeat(self.top_k)


class NumbersOfTheFirstHalf(Numbered):
    """Each number stands twice as often as a token has slots."""

    def numbers(self, count):
        return torch.arange(count // 2).repeat_interleave(2 * self.top_k)


class NumbersWritten(Numbered):
    def numbers(self, count):
        numbers = super().numbers(count)
        numbers[:3] = 5
        return numbers


class RowsOfTiledNumbers(Numbered):
    """The right tokens get what was computed of others."""

    def rows(self, x, numbers, mask):
        return x[torch.arange(x.shape[0]).repeat(self.top_k)[mask]]


class WeightsSlotBySlot(Numbered):
    def weights(self, weights):
        return weights.t().reshape(-1)


class NumbersOfAnotherOrder(MaskLoop):
    """The tokens of two sorts of the same ids, which differ among the slots of one expert."""

    def moe(self, x, ids, weights):
        flat, out, start = ids.reshape(-1), torch.zeros_like(x), 0
        order, other = flat.argsort(), (flat * flat.shape[0] - torch.arange(flat.shape[0])).argsort()
        numbers, weights = torch.arange(x.shape[0]).repeat_interleave(self.top_k)[other], weights.reshape(-1)[order]
        for e, count in enumerate(flat.bincount(minlength=self.num_experts).tolist()):
            tokens = numbers[start : start + count]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[start : start + count, None])
            start += count
        return out


class FewerSortedCounted(MaskLoop):
    """The last of the sorted experts isn't counted."""

    def moe(self, x, ids, weights):
        experts, order = ids.reshape(-1).sort()
        tokens, weights, out, start = order // self.top_k, weights.reshape(-1)[order], torch.zeros_like(x), 0
        counts = experts[:-1].bincount(minlength=self.num_experts)
        for e in range(self.num_experts):
            count = int(counts[e])
            own = tokens[start : start + count]
            out.index_add_(0, own, self.experts[e](x[own]) * weights[start : start + count, None])
            start += count
        return out


class Copied(MaskLoop):
    """Rows are copied for each slot, and the slots are summed after the loop."""

    def copies(self, x):
        return x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, D)

    def moe(self, x, ids, weights):
        rows, flat = self.copies(x), ids.reshape(-1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return (y.view(-1, self.top_k, D) * weights.unsqueeze(-1)).sum(dim=1)


class CopiedOneAfterTheOther(Copied):
    """All rows for the first slot, then all for the second."""

    def copies(self, x):
        return x.unsqueeze(0).expand(self.top_k, -1, -1).reshape(-1, D)


class CopiesWritten(Copied):
    """The first token's second slot reads zeros."""

    def copies(self, x):
        rows = super().copies(x)
        rows[1] = 0
        return rows


BODIES, FORM = "bodies_are_isomorphic", "loop_has_a_known_form"

MISSES = (
    NearMiss("slot_numbers_tiled", FORM, TiledNumbers),
    NearMiss("slot_numbers_of_first_half", FORM, NumbersOfTheFirstHalf),
    NearMiss("slot_numbers_written", FORM, NumbersWritten),
    NearMiss("slot_numbers_rows_of_others", BODIES, RowsOfTiledNumbers),
    NearMiss("slot_numbers_weights_by_slot", BODIES, WeightsSlotBySlot),
    NearMiss("slot_numbers_of_another_order", FORM, NumbersOfAnotherOrder),
    NearMiss("slot_numbers_fewer_counted", "segments_are_those_of_an_expert", FewerSortedCounted),
    NearMiss("flat_copies_tiled", BODIES, CopiedOneAfterTheOther),
    NearMiss("flat_copies_written", "nothing_is_written_inside", CopiesWritten),
)
