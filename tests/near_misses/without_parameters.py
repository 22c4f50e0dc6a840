"""Experts without parameters that are not alike or not the last, and what an iteration computes for nobody else."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss, StackedLoop, hits
from tests.zoo.common import FF, D, E
from tests.zoo.stacked import StackedBlock, StackedExperts
from tests.zoo.without_parameters import WithIdentityExperts, block


class OneScaled(WithIdentityExperts):
    """One of the experts without parameters is no identity."""

    def free(self, rows, e, _out):
        return rows * 2.0 if e == E + 1 else rows


class RowsMixed(WithIdentityExperts):
    def free(self, rows, _e, _out):
        return rows.flip(0)


class OutputRead(WithIdentityExperts):
    """The last expert reads what the others have added."""

    def free(self, rows, e, out):
        return rows + out.mean() if e == 2 * E - 1 else rows


class OutputRead0(WithIdentityExperts):
    """Between the experts with parameters and those without, somebody reads the output."""

    def free(self, rows, e, out):
        if e == E:
            self.seen = out.sum()
        return rows


class IdentityFirst(WithIdentityExperts):
    """Expert 0 passes its rows through, the others do not."""

    def expert(self, rows, e):
        return rows if e == 0 else super().expert(rows, e)

    def free(self, rows, e, _out):
        return super().expert(rows, e - E)


class OtherName(WithIdentityExperts):
    """A view of the output, made before the loop, is read after it."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        view = out.view(-1)
        mask = F.one_hot(ids, num_classes=2 * E).permute(2, 1, 0)
        for e in range(2 * E):
            tokens, slots = torch.where(mask[e].t())
            y = x[tokens] if e >= E else self.expert(x[tokens], e)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out + view.view_as(out)


class NamedResult(WithIdentityExperts):
    """What the last addition of an expert with parameters returned, which is the output, is read after the loop."""

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=2 * E).permute(2, 1, 0)
        for e in range(2 * E):
            tokens, slots = torch.where(mask[e].t())
            y = x[tokens] if e >= E else self.expert(x[tokens], e)
            added = out.index_add_(0, tokens, y * weights[tokens, slots, None])
            if e == E - 1:
                other = added
        return out + other


class InvariantIsRead(StackedLoop):
    """What each iteration computes from the parameters alone is read after the loop."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(D))

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        scale = None
        for e in hit:
            slots, tokens = torch.where(mask[e[0]])
            scale = self.value()
            out.index_add_(0, tokens, self.expert(x[tokens], e[0]) * scale * weights[tokens, slots, None])
        return self.after(out, scale)

    def value(self):
        return 1.0 + self.scale

    def after(self, out, scale):
        return out * scale


class InvariantIsRandom(InvariantIsRead):
    def value(self):
        return F.dropout(self.scale)

    def after(self, out, _scale):
        return out


class InvariantIsWritten(InvariantIsRead):
    """Each iteration doubles what the next one reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(D))

    def value(self):
        self.factor.mul_(2.0)
        return 1.0 + self.factor

    def after(self, out, _scale):
        return out


class ShiftedIds(StackedExperts):
    """The router's ids are shifted in place: the class that no router chooses occurs after all."""

    def __init__(self):
        super().__init__(E + 1)

    def forward(self, x, ids, weights):
        ids = ids.clone()
        ids += 1
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in hits(mask):
            e = self.number(e[0])
            slots, tokens = torch.where(mask[e])
            gate, up = F.linear(x[tokens], self.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out

    def number(self, e):
        return e


class ShiftedNumbers(ShiftedIds):
    def number(self, e):
        return e.item()


class FewerWeights(StackedLoop):
    """Weights of one expert less than there are classes: the last one never occurs, but nothing says so."""

    def __init__(self):
        super().__init__()
        self.experts.down_proj = torch.nn.Parameter(torch.empty(E - 1, D, FF))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids.clamp(max=E - 2), num_classes=E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e[0]])
            out.index_add_(0, tokens, self.expert(x[tokens], e[0]) * weights[tokens, slots, None])
        return out


FORM = "loop_has_a_known_form"

MISSES = (
    NearMiss("hit_free_one_scaled", "bodies_are_isomorphic", block(OneScaled)),
    NearMiss("hit_free_rows_mixed", "body_is_row_wise", block(RowsMixed)),
    NearMiss("hit_free_output_read", "bodies_are_isomorphic", block(OutputRead)),
    NearMiss("hit_free_output_kept", "loop_changes_no_python_state", block(OutputRead0)),
    NearMiss("hit_free_first", "bodies_are_isomorphic", block(IdentityFirst)),
    NearMiss("range_free_other_name", "accumulator_is_not_read_inside", block(OtherName)),
    NearMiss("range_free_named_result", "bodies_are_isomorphic", block(NamedResult)),
    NearMiss("hit_invariant_is_read", FORM, InvariantIsRead),
    NearMiss("hit_invariant_is_random", FORM, InvariantIsRandom),
    NearMiss("hit_invariant_is_written", FORM, InvariantIsWritten),
    NearMiss("hit_shifted_ids", "every_expert_is_covered", lambda: StackedBlock(ShiftedIds), may_rewrite=True),
    NearMiss("hit_shifted_numbers", "every_expert_is_covered", lambda: StackedBlock(ShiftedNumbers), may_rewrite=True),
    NearMiss("hit_fewer_weights", "every_expert_is_covered", FewerWeights),
)
