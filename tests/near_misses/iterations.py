"""Iterations that are not alike, and rows that are not alike."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import Loop, NearMiss, RangeLoop, StackedLoop
from tests.zoo.common import FF, D, E
from tests.zoo.stacked import StackedExperts

STEPS = {"count": 0}


class SkipsFromTwo(StackedLoop):
    """`>= 2` is no sentinel here."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            if e >= 2:
                continue
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class SkipsLast(StackedLoop):
    """One class less than there are: the last expert is taken for the sentinel."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            if e == self.num_experts - 1:
                continue
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class OnlyTwo(StackedLoop):
    """Only expert 2 runs."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            if e == 2:
                slots, tokens = torch.where(mask[e])
                out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class AllButTwo(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            if e != 2:
                slots, tokens = torch.where(mask[e])
                out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class SentinelPassesThrough(StackedLoop):
    """Tokens of the null expert keep their input."""

    def __init__(self):
        super().__init__(classes=E + 1)

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states, classes=E + 1)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            if e == self.num_experts:
                out.index_add_(0, tokens, x[tokens] * weights[tokens, slots, None])
                continue
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class NullExpertSkipped(StackedLoop):
    """Tokens of the null expert get nothing: the sentinel at work."""

    def __init__(self):
        super().__init__(classes=E + 1)

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states, classes=E + 1)
        for e in hit:
            e = e[0]
            if e == self.num_experts:
                continue
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class SortedTokens(StackedLoop):
    """Tokens sorted, slots not."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            tokens = tokens.sort().values
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out


class RowTable(StackedLoop):
    """The n-th row of every expert gets the n-th factor of a table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(0.5, 1.5, 64))

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e) * self.table[: tokens.shape[0], None]
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class NormalizedOverTokens(StackedLoop):
    """F.normalize along the tokens."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = F.normalize(self.expert(x[tokens], e), dim=0)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class UpOfAnother(StackedLoop):
    """Gate and up of expert e, down of the expert before."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            gate, up = F.linear(x[tokens], self.experts.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.experts.down_proj[e - 1])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class FixedDown(StackedLoop):
    """One down projection for all experts: a shared weight, rows independent."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            gate, up = F.linear(x[tokens], self.experts.gate_up_proj[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.experts.down_proj[0])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class OwnTemporaryInPlace(StackedLoop):
    """In-place operators on tensors born in the iteration."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e)
            y *= weights[tokens, slots, None]
            out.index_add_(0, tokens, y)
        return out


class InPlaceBeforeLoop(StackedLoop):
    """x changes after routing and before the loop."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        state = x * 1
        state.mul_(2)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(state[tokens], e) * weights[tokens, slots, None])
        out.add_(state)
        return out


class TwoLayersOfExperts(StackedLoop):
    """Two loops into one accumulator."""

    def __init__(self):
        super().__init__()
        self.more = StackedExperts()

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = F.linear(F.relu(F.linear(x[tokens], self.more.gate_up_proj[e])[:, :FF]), self.more.down_proj[e])
            out.index_add_(0, tokens, y)
        return out


class LoopVariableOfList(Loop):
    """The experts' own attribute says which mask they take."""

    def __init__(self):
        super().__init__()
        for e, expert in enumerate(self.experts):
            expert.serves = (e + 1) % self.num_experts

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for expert in self.experts:
            slots, tokens = torch.where(mask[expert.serves])
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class NumberIsTwo(RangeLoop):
    """Small integers are the same object wherever they come from."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        two = 2
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.value(x, weights, tokens, slots, e)
            self.add(out, tokens, y * 3 if e is two else y)
        return out


class LastNumberIs(RangeLoop):
    """The loop's last number, after it."""

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            self.add(out, tokens, self.value(x, weights, tokens, slots, e))
        last = E - 1
        return out * 3 if e is last else out


class EntryOfEntry(RangeLoop):
    """Expert e has row e of what it has."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(E, E, D))

    def value(self, x, weights, tokens, slots, e):
        return super().value(x, weights, tokens, slots, e) + self.rows[e][e]


STATE, FORM = "loop_changes_no_python_state", "loop_has_a_known_form"

MISSES = (
    NearMiss("hit_skips_from_two", None, SkipsFromTwo, may_rewrite=True),
    NearMiss("hit_skips_last", None, SkipsLast, may_rewrite=True),
    NearMiss("hit_only_two", FORM, OnlyTwo),
    NearMiss("hit_all_but_two", "every_expert_is_covered", AllButTwo),
    NearMiss("hit_sentinel_passes_through", FORM, SentinelPassesThrough),
    NearMiss("hit_null_expert_skipped", FORM, NullExpertSkipped, may_rewrite=True),
    NearMiss("hit_sorted_tokens", FORM, SortedTokens),
    NearMiss("hit_row_table", "operations_are_known", RowTable),
    NearMiss("hit_normalized_over_tokens", "body_is_row_wise", NormalizedOverTokens),
    NearMiss("hit_down_of_another", FORM, UpOfAnother),
    NearMiss("hit_fixed_down", FORM, FixedDown, may_rewrite=True),
    NearMiss("hit_own_temporary_in_place", "nothing_is_written_inside", OwnTemporaryInPlace, may_rewrite=True),
    NearMiss("hit_in_place_before_loop", "nothing_is_written_inside", InPlaceBeforeLoop, may_rewrite=True),
    NearMiss("hit_two_layers_of_experts", FORM, TwoLayersOfExperts, may_rewrite=True),
    NearMiss("range_number_is_two", "bodies_are_isomorphic", NumberIsTwo),
    NearMiss("range_last_number_is", None, LastNumberIs, may_rewrite=True),
    NearMiss("range_entry_of_entry", "bodies_are_isomorphic", EntryOfEntry),
    NearMiss("range_loop_variable_of_list", "every_expert_is_covered", LoopVariableOfList, may_rewrite=True),
)
