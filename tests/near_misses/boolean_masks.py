"""Boolean masks that name a token once for several slots, weights of other slots, assignments that overwrite."""

import torch

from tests.near_misses.common import Loop, NearMiss
from tests.zoo.masks import MaskLoop, TopOne


class AnyMaskOfClampedIds(MaskLoop):
    """A token may have an expert twice; its row is added once, with the sum of both weights."""

    def moe(self, x, ids, weights):
        ids = ids.clamp(max=self.num_experts - 3)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            out[rows] += self.experts[e](x[rows]) * (weights * chosen).sum(-1)[rows].unsqueeze(-1)
        return out


class MaskSelected(MaskLoop):
    """`masked_select` takes the rows' entries one by one."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            own = x.masked_select(rows[:, None]).view(-1, x.shape[1])
            out[rows] += self.experts[e](own) * (weights * chosen).sum(-1)[rows].unsqueeze(-1)
        return out


class AnyMaskTransposed(MaskLoop):
    """The transpose of one dim is what it was."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            rows = chosen.any(dim=-1).t()
            out[rows] += self.experts[e](x[rows]) * (weights * chosen).sum(-1)[rows].unsqueeze(-1)
        return out


class AnyMaskOfModuloIds(MaskLoop):
    """The same by %, without weights: each token's row is added once."""

    def moe(self, x, ids, weights):
        ids = ids % 2
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            out.index_add_(0, rows.nonzero().squeeze(-1), self.experts[e](x[rows]))
        return out * weights.sum(-1, keepdim=True)


class AnyMaskOfHashedIds(MaskLoop):
    """Ids by a table of the token's number: repeated ones in a row."""

    def moe(self, x, ids, weights):
        ids = torch.stack([torch.arange(x.shape[0]) * 7 % 3, torch.arange(x.shape[0]) % self.num_experts], dim=1)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            out[rows] += self.experts[e](x[rows])
        return out * weights.sum(-1, keepdim=True)


class AllMask(MaskLoop):
    """`all` where `any` is meant."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).all(dim=-1)
            out[rows] += self.experts[e](x[rows]) * weights[rows].sum(-1, keepdim=True)
        return out + x


class WeightOfAnotherExpert(MaskLoop):
    """The masked sum is that of the next expert."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            other = ids == (e + 1) % self.num_experts
            out[rows] += self.experts[e](x[rows]) * (weights * other).sum(dim=-1)[rows].unsqueeze(-1)
        return out


class ColumnOfAnotherExpert(MaskLoop):
    """The gates' column is that of the expert before."""

    def moe(self, x, ids, weights):
        gates = torch.zeros(x.shape[0], self.num_experts).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            out[rows] += self.experts[e](x[rows]) * gates[rows, e - 1, None]
        return out


class MaskChangedAfterwards(MaskLoop):
    """The mask that weighs is written before it is used."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            chosen = ids == e
            chosen.logical_and_(weights > 0.5)
            out[rows] += self.experts[e](x[rows]) * (weights * chosen).sum(dim=-1)[rows].unsqueeze(-1)
        return out


class WeightsFade(MaskLoop):
    """The weights fade from expert to expert; each expert's sum over slots is taken in time."""

    def moe(self, x, ids, weights):
        weights = weights * 1
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            out[rows] += self.experts[e](x[rows]) * (weights * chosen).sum(dim=-1)[rows].unsqueeze(-1)
            with torch.no_grad():
                weights.mul_(0.5)
        return out


class SumOverTokens(MaskLoop):
    """The masked weights are summed over the tokens of a square table: a sum of the wrong dim."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            chosen = ids == e
            rows = chosen.any(dim=-1)
            out[rows] += self.experts[e](x[rows]) * (weights * chosen).sum(dim=0)[0]
        return out


class OtherSlotWeight(MaskLoop):
    """Slot k's tokens get the weight of the slot before."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                out[mask] += self.experts[e](x[mask]) * weights[mask, k - 1].unsqueeze(-1)
        return out


class OtherSlotGuard(MaskLoop):
    """Slot k's work is done only if the first slot has a token of the expert."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask, first = ids[:, k] == e, ids[:, 0] == e
                if first.any():
                    out[mask] += self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class OwnExpertsBySlot(MaskLoop):
    """The second slot's experts are numbered the other way round."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                expert = self.experts[e if k == 0 else self.num_experts - 1 - e]
                out[mask] += expert(x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class PairLeftOut(MaskLoop):
    """The last expert serves the first slot alone."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts - k):
                mask = ids[:, k] == e
                out[mask] += self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class SlotTwice(MaskLoop):
    """The first slot is visited twice, the second never."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in (0, 0):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                out[mask] += self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class SlotsFade(MaskLoop):
    """The second slot counts half."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                out[mask] += self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1) * 0.5**k
        return out


class ReadBetweenSlots(MaskLoop):
    """The second slot's experts see what the first slot's have added."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            state = x + out
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                out[mask] += self.experts[e](state[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class AssignedBySlot(MaskLoop):
    """The second slot overwrites the first."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                out[mask] = self.experts[e](x[mask]) * weights[mask, k].unsqueeze(-1)
        return out


class AssignedAnyMask(MaskLoop):
    """A later expert overwrites an earlier one."""

    def moe(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            rows = (ids == e).any(dim=-1)
            out[rows] = self.experts[e](x[rows]) * weights[rows].sum(-1, keepdim=True)
        return out


class AssignedToInput(TopOne):
    """Rows are assigned to the tensor that the experts read, which the caller gets too."""

    def moe(self, x, ids, weights):
        state = x * 1
        for e in range(self.num_experts):
            mask = ids == e
            state[mask] = self.experts[e](state[mask]) * weights[mask].unsqueeze(-1)
        return state


class AssignedThenAdded(TopOne):
    """The first expert assigns, the others add to what may not be zero."""

    def moe(self, x, ids, weights):
        out = x.clone()
        for e in range(self.num_experts):
            mask = ids == e
            y = self.experts[e](x[mask]) * weights[mask].unsqueeze(-1)
            if e == 0:
                out[mask] = y
            else:
                out[mask] += y
        return out


class AssignedWithoutLast(TopOne):
    """The last expert's tokens keep their input; ids name it all the same."""

    def moe(self, x, ids, weights):
        out = x.clone()
        for e in (0, 2, 3):
            mask = ids == e
            out[mask] = self.experts[e](x[mask]) * weights[mask].unsqueeze(-1)
        return out


class AssignedToView(Loop):
    """The output is a view of a larger tensor, which the caller gets."""

    def __init__(self):
        super().__init__(top_k=1)

    def forward(self, hidden_states):
        x, ids, weights, _, _ = self.begin(hidden_states)
        ids, weights = ids.squeeze(-1), weights.squeeze(-1)
        both = torch.cat([x, x])
        out = both[: x.shape[0]]
        for e in range(self.num_experts):
            mask = ids == e
            out[mask] = self.experts[e](x[mask]) * weights[mask].unsqueeze(-1)
        return both


REPEATED, BODIES, COVERED = "repeated_ids_are_counted", "bodies_are_isomorphic", "every_expert_is_covered"
OVERWRITES, ZEROS = "assignments_overwrite_nothing", "accumulator_may_be_added_to"

MISSES = (
    NearMiss("any_mask_clamped_ids", REPEATED, AnyMaskOfClampedIds),
    NearMiss("any_mask_transposed", None, AnyMaskTransposed, may_rewrite=True),
    NearMiss("any_mask_modulo_ids", REPEATED, AnyMaskOfModuloIds),
    NearMiss("any_mask_hashed_ids", REPEATED, AnyMaskOfHashedIds),
    NearMiss("any_mask_rows_selected", BODIES, MaskSelected),
    NearMiss("any_mask_of_all", "loop_has_a_known_form", AllMask),
    NearMiss("any_mask_weight_of_another", BODIES, WeightOfAnotherExpert),
    NearMiss("any_mask_column_of_another", BODIES, ColumnOfAnotherExpert),
    NearMiss("any_mask_changed", "nothing_is_written_inside", MaskChangedAfterwards),
    NearMiss("any_mask_weights_fade", "nothing_is_written_inside", WeightsFade),
    NearMiss("any_mask_sum_over_tokens", BODIES, SumOverTokens),
    NearMiss("slots_weight_of_another", BODIES, OtherSlotWeight),
    NearMiss("slots_guard_of_another", "guards_are_of_the_same_expert", OtherSlotGuard),
    NearMiss("slots_own_experts", BODIES, OwnExpertsBySlot),
    NearMiss("slots_pair_left_out", COVERED, PairLeftOut),
    NearMiss("slots_first_twice", COVERED, SlotTwice),
    NearMiss("slots_fade", BODIES, SlotsFade),
    NearMiss("slots_read_between", BODIES, ReadBetweenSlots),
    NearMiss("assigned_by_slot", COVERED, AssignedBySlot),
    NearMiss("assigned_any_mask", OVERWRITES, AssignedAnyMask),
    NearMiss("assigned_to_input", "accumulator_is_not_read_inside", AssignedToInput),
    NearMiss("assigned_then_added", OVERWRITES, AssignedThenAdded),
    NearMiss("assigned_without_one", COVERED, AssignedWithoutLast),
    NearMiss("assigned_to_view", ZEROS, AssignedToView),
)
