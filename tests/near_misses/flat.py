"""Flat pairs whose rows are in another order, are read elsewhere, or are not summed by token."""

import torch

from tests.near_misses.common import NearMiss
from tests.zoo.common import D
from tests.zoo.masks import MaskLoop


class FlatLoop(MaskLoop):
    """The loop over flat pairs; a near miss changes one of its steps."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids)
        return (y.view(*ids.shape, D) * weights.unsqueeze(-1)).sum(dim=1)

    def rows_of_slots(self, x, ids):
        flat, rows = ids.view(-1), self.repeated(x)
        y = self.start(rows)
        for e in self.numbers():
            y[flat == e] = self.experts[e](rows[flat == e])
        return y

    def repeated(self, x):
        return x.repeat_interleave(self.top_k, dim=0)

    def start(self, rows):
        return torch.zeros_like(rows)

    def numbers(self):
        return range(self.num_experts)


class Tiled(FlatLoop):
    """All tokens once, then all again: another order than that of the slots."""

    def repeated(self, x):
        return x.repeat(self.top_k, 1)


class FlatStartsAsInput(FlatLoop):
    """Slots without an expert would keep their input."""

    def start(self, rows):
        return rows.clone()


class FlatWithoutSecond(FlatLoop):
    """An expert is left out: its slots give zeros."""

    def numbers(self):
        return (0, 2, 3)


class FlatAddedToUndefined(FlatLoop):
    """`+=` reads what `empty_like` left there; zeros by accident of the test alone."""

    def rows_of_slots(self, x, ids):
        flat, rows = ids.view(-1), self.repeated(x)
        y = torch.empty_like(rows).fill_(0)
        for e in self.numbers():
            y[flat == e] += self.experts[e](rows[flat == e])
        return y


class FlatReturnedToo(FlatLoop):
    """The experts' rows are used a second time."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids)
        out = (y.view(*ids.shape, D) * weights.unsqueeze(-1)).sum(dim=1)
        return out + y.mean(dim=0)


class FlatSummedAcross(FlatLoop):
    """The slots are summed as if they lay the other way round."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids)
        return (y.view(self.top_k, -1, D) * weights.t().unsqueeze(-1)).sum(dim=0)


class FlatMean(FlatLoop):
    """The mean over the slots."""

    def moe(self, x, ids, weights):
        y = self.rows_of_slots(x, ids)
        return (y.view(*ids.shape, D) * weights.unsqueeze(-1)).mean(dim=1)


class FlatReadEarly(FlatLoop):
    """The slots are weighted and summed before the last expert has written its own."""

    def moe(self, x, ids, weights):
        flat, rows = ids.view(-1), self.repeated(x)
        y = torch.zeros_like(rows)
        for e in range(self.num_experts):
            if e == self.num_experts - 1:
                out = (y.view(*ids.shape, D) * weights.detach().unsqueeze(-1)).sum(dim=1)
            y[flat == e] = self.experts[e](rows[flat == e])
        return out


class FlatOtherDivisor(MaskLoop):
    """The slots' tokens by another divisor than the number of slots."""

    def moe(self, x, ids, weights):
        flat, flat_weights = ids.view(-1), weights.view(-1)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            slots = torch.where(flat == e)[0]
            tokens = slots // (self.top_k + 1)
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * flat_weights[slots].unsqueeze(1))
        return out


class FlatWeightOfChoice(MaskLoop):
    """The weight of the choice's number, taken from the first tokens."""

    def moe(self, x, ids, weights):
        flat, flat_weights = ids.view(-1), weights.view(-1)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            slots = torch.where(flat == e)[0]
            tokens = slots // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * flat_weights[slots % self.top_k].unsqueeze(1))
        return out


class PairedLoop(MaskLoop):
    """The loop over slots in two dims; a near miss changes one of its steps."""

    def moe(self, x, ids, weights):
        return self.combine(self.rows_of_slots(x, ids), weights)

    def rows_of_slots(self, x, ids):
        y = self.start(x, ids)
        for e in self.numbers():
            tokens, slots = torch.where(ids == e)
            self.write(y, tokens, slots, self.experts[e](x[tokens]))
        return y

    def start(self, x, ids):
        return x.new_zeros(*ids.shape, D)

    def numbers(self):
        return range(self.num_experts)

    def write(self, y, tokens, slots, rows):
        y[tokens, slots] = rows

    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).sum(dim=1)


class PairedStartsAsInput(PairedLoop):
    """Slots without an expert would keep their token."""

    def start(self, x, ids):
        return x.unsqueeze(1).repeat(1, ids.shape[1], 1)


class PairedWithoutSecond(PairedLoop):
    """An expert is left out: its slots give zeros."""

    def numbers(self):
        return (0, 2, 3)


class PairedOtherSlot(PairedLoop):
    """Each slot's rows are written to the slot beside it, whose weight they get."""

    def write(self, y, tokens, slots, rows):
        y[tokens, (slots + 1) % self.top_k] = rows


class PairedFirstSlot(PairedLoop):
    """All slots are written to the first."""

    def write(self, y, tokens, slots, rows):
        y[tokens, slots * 0] = rows


class PairedLargest(PairedLoop):
    """The largest of the slots, feature by feature."""

    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).amax(dim=1)


class PairedWeightsTurned(PairedLoop):
    """The slots get each other's weights."""

    def combine(self, y, weights):
        return (y * weights.flip(1).unsqueeze(1).transpose(1, 2)).sum(dim=1)


class PairedSummedOverTokens(PairedLoop):
    """What is summed are the tokens, not their slots."""

    def combine(self, y, weights):
        return (y * weights.unsqueeze(-1)).sum(dim=0).repeat(y.shape[0] // self.top_k, 1)


class PairedReadBetween(PairedLoop):
    """The mean of the rows so far is added to the output."""

    def rows_of_slots(self, x, ids):
        y = self.start(x, ids)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            y[tokens, slots] = self.experts[e](x[tokens]) + y.mean()
        return y


class CopiedByToken(MaskLoop):
    """A later slot's rows overwrite those of an earlier one."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            tokens, slots = torch.where(ids == e)
            out.index_copy_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class FlatRowsWritten(FlatLoop):
    """The repeated rows are written to before anyone chooses among them; the tokens stay what they were."""

    def rows_of_slots(self, x, ids):
        rows = x.repeat_interleave(self.top_k, dim=0)
        rows.mul_(2)
        flat, y = ids.view(-1), self.start(rows)
        for e in self.numbers():
            y[flat == e] = self.experts[e](rows[flat == e])
        return y


class FlatIdsWritten(FlatLoop):
    """`reshape` copies ids that don't lie side by side: what is written to the copy is not written to them."""

    def moe(self, x, ids, weights):
        three = torch.cat((ids, ids[:, :1]), dim=1)
        return super().moe(x, three[:, :2], weights)

    def rows_of_slots(self, x, ids):
        flat, rows = ids.reshape(-1), self.repeated(x)
        flat.clamp_(max=1)
        y = self.start(rows)
        for e in self.numbers():
            y[flat == e] = self.experts[e](rows[flat == e])
        return y


class FlatWeightsWritten(MaskLoop):
    """So for weights."""

    def moe(self, x, ids, weights):
        flat, flat_weights = ids.view(-1), torch.cat((weights, weights), dim=1)[:, :2].reshape(-1)
        flat_weights.mul_(2)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            slots = torch.where(flat == e)[0]
            tokens = slots // self.top_k
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * flat_weights[slots].unsqueeze(1))
        return out


class FlatSourceWritten(FlatLoop):
    """What the rows were copied from is written to by another name, and not read elsewhere."""

    def rows_of_slots(self, x, ids):
        x = x * 1
        flat, rows = ids.view(-1), self.repeated(x)
        y = self.start(rows)
        for e in self.numbers():
            y[flat == e] = self.experts[e](rows[flat == e])
            x.detach().mul_(0.5)
        return y


WRITTEN = "nothing_is_written_inside"
ZEROS, SUMMED = "accumulator_may_be_added_to", "slots_of_a_token_are_summed"

MISSES = (
    NearMiss("flat_tiled", "bodies_are_isomorphic", Tiled),
    NearMiss("flat_starts_as_input", ZEROS, FlatStartsAsInput),
    NearMiss("flat_without_second", "every_expert_is_covered", FlatWithoutSecond),
    NearMiss("flat_added_to_undefined", ZEROS, FlatAddedToUndefined),
    NearMiss("flat_returned_too", "no_intermediate_escapes", FlatReturnedToo),
    NearMiss("flat_summed_across", SUMMED, FlatSummedAcross),
    NearMiss("flat_mean", SUMMED, FlatMean),
    NearMiss("flat_read_early", "accumulator_is_not_read_inside", FlatReadEarly),
    NearMiss("flat_other_divisor", "loop_has_a_known_form", FlatOtherDivisor),
    NearMiss("flat_weight_of_choice", "bodies_are_isomorphic", FlatWeightOfChoice),
    NearMiss("paired_starts_as_input", ZEROS, PairedStartsAsInput),
    NearMiss("paired_without_second", "every_expert_is_covered", PairedWithoutSecond),
    NearMiss("paired_other_slot", "loop_has_a_known_form", PairedOtherSlot),
    NearMiss("paired_first_slot", "loop_has_a_known_form", PairedFirstSlot),
    NearMiss("paired_largest", SUMMED, PairedLargest),
    NearMiss("paired_weights_turned", SUMMED, PairedWeightsTurned, may_rewrite=True),
    NearMiss("paired_summed_over_tokens", SUMMED, PairedSummedOverTokens),
    NearMiss("paired_read_between", "no_intermediate_escapes", PairedReadBetween),
    NearMiss("copied_by_token", "assignments_overwrite_nothing", CopiedByToken),
    NearMiss("flat_rows_written", WRITTEN, FlatRowsWritten),
    NearMiss("flat_source_written", WRITTEN, FlatSourceWritten),
    NearMiss("flat_ids_written", WRITTEN, FlatIdsWritten),
    NearMiss("flat_weights_written", WRITTEN, FlatWeightsWritten),
)
