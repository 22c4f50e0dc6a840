"""What one iteration hands to the next, or to what comes after the loop."""

from functools import partial

import torch

from tests.near_misses.common import NearMiss, RangeLoop, StackedLoop
from tests.zoo.common import D

LAST = torch.zeros(())


class Enumerated(StackedLoop):
    """The position among the hits scales the output."""

    def forward(self, hidden_states):
        x, weights, mask, hit, out = self.begin(hidden_states)
        for i, e in enumerate(hit):
            e = e[0]
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.expert(x[tokens], e) * (1 + i) * weights[tokens, slots, None])
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


class LastHit(RangeLoop):
    """What the last expert with a token left in a local variable, which has a value before the loop or none."""

    def __init__(self, bound):
        super().__init__()
        self.bound = bound

    def forward(self, hidden_states):
        x, weights, mask, out = self.start(hidden_states)
        scaled = [x * 1, x * 2, x * 3, x * 4]
        if self.bound:
            last = x * 0
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            last = scaled[e]
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out + last


class GlobalTensor(RangeLoop):
    """A global is bound to a tensor of the last expert with a token."""

    def forward(self, hidden_states):
        global LAST
        x, weights, mask, out = self.start(hidden_states)
        scaled = [x.detach() * factor for factor in range(1, 5)]
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            if tokens.numel() == 0:
                continue
            LAST = scaled[e]
            out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out + LAST


STATE = "loop_changes_no_python_state"

MISSES = (
    NearMiss("hit_enumerated", "loop_has_a_known_form", Enumerated),
    NearMiss("hit_first_is_special", STATE, FirstIsSpecial),
    NearMiss("hit_tensor_factor", "carried_tensors_are_the_output", TensorFlag),
    NearMiss("hit_previous_rows", "carried_tensors_are_the_output", PreviousRows),
    NearMiss("hit_token_total", "no_intermediate_escapes", TokenTotal),
    NearMiss("range_last_hit", STATE, partial(LastHit, bound=True)),
    NearMiss("range_last_hit_unbound", STATE, partial(LastHit, bound=False)),
    NearMiss("range_global_tensor", STATE, GlobalTensor),
)
