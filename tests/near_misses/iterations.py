"""Iterations that are not alike: Python values, positions and sentinels that one iteration hands to the next."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import Loop, NearMiss, hits
from tests.zoo.common import FF, D, E
from tests.zoo.stacked import StackedExperts, TopKRouter

STEPS = {"count": 0}


class StackedLoop(nn.Module):
    """Router and stacked experts: no ModuleList, so one iteration may stand for all."""

    def __init__(self, classes=E):
        super().__init__()
        self.num_experts = E
        self.gate = TopKRouter(num_experts=classes)
        self.experts = StackedExperts()

    def begin(self, hidden_states, classes=E):
        """Return x_TD, topk_weights_TK, mask_EKT, hit_H1 and an accumulator of zeros."""
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        mask = F.one_hot(ids, num_classes=classes).permute(2, 1, 0)
        return x, weights, mask, hits(mask), torch.zeros_like(x)

    def expert(self, x, e):
        gate, up = F.linear(x, self.experts.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.experts.down_proj[e])


class Enumerated(StackedLoop):
    """The position among the hits scales the output."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for i, e in enumerate(hit):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * (1 + i) * weights[tokens, slots, None])
        return out


class CountedByIterator(StackedLoop):
    """next() of an iterator made before the loop."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        numbers = itertools.count(1)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * next(numbers) * weights[tokens, slots, None])
        return out


class ListIterator(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        scales = iter([1.0, 2.0, 3.0, 4.0])
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * next(scales) * weights[tokens, slots, None])
        return out


class PoppedList(StackedLoop):
    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        scales = [1.0, 2.0, 3.0, 4.0]
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * scales.pop() * weights[tokens, slots, None])
        return out


class FirstIsSpecial(StackedLoop):
    """A flag that the first iteration clears."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        first = True
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e)
            if first:
                y, first = y * 2, False
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class TensorFlag(StackedLoop):
    """A tensor factor that halves from iteration to iteration."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        factor = torch.ones(())
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * factor * weights[tokens, slots, None])
            factor = factor * 0.5
        return out


class PreviousRows(StackedLoop):
    """An expert adds the mean of the expert before."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        previous = torch.zeros(D)
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            y = self.expert(x[tokens], e) + previous
            previous = y.mean(dim=0)
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class Box:
    """A fresh object with one attribute."""

    def __init__(self):
        self.value = 0


class FreshObject(StackedLoop):
    """The attribute of an object made before the loop counts iterations."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        box = Box()
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            box.value += 1
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * box.value


class Nonlocal(StackedLoop):
    """A closure's variable counts iterations."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        count = 0

        def tick():
            nonlocal count
            count += 1

        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            tick()
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * count


class GlobalDict(StackedLoop):
    """An entry of a module-level dictionary counts iterations; the result shows it."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        STEPS["count"] = 0
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            STEPS["count"] += 1
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * STEPS["count"]


class TokenTotal(StackedLoop):
    """The sizes are summed; the sum is known (T * K), the loop is not the place to see it."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        total = 0
        for e in hit:
            e = e[0]
            slots, tokens = torch.where(mask[e])
            total = total + tokens.shape[0]
            out.index_add_(0, tokens, self.expert(x[tokens], e) * weights[tokens, slots, None])
        return out * total


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


STATE, FORM = "loop_changes_no_python_state", "loop_has_a_known_form"

MISSES = (
    NearMiss("hit_enumerated", FORM, Enumerated),
    NearMiss("hit_counted_by_iterator", STATE, CountedByIterator),
    NearMiss("hit_list_iterator", STATE, ListIterator),
    NearMiss("hit_popped_list", STATE, PoppedList),
    NearMiss("hit_first_is_special", STATE, FirstIsSpecial),
    NearMiss("hit_tensor_factor", "carried_tensors_are_the_output", TensorFlag),
    NearMiss("hit_previous_rows", "carried_tensors_are_the_output", PreviousRows),
    NearMiss("hit_fresh_object", STATE, FreshObject),
    NearMiss("hit_nonlocal", STATE, Nonlocal),
    NearMiss("hit_global_dict", STATE, GlobalDict),
    NearMiss("hit_token_total", "no_intermediate_escapes", TokenTotal),
    NearMiss("hit_skips_from_two", "every_expert_is_covered", SkipsFromTwo),
    NearMiss("hit_skips_last", "every_expert_is_covered", SkipsLast),
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
    NearMiss("range_loop_variable_of_list", "every_expert_is_covered", LoopVariableOfList, may_rewrite=True),
)
