"""Weights that are computed in the loop, of more than an expert's own parameters or in another way by each."""

import torch
from torch.nn import functional as F

from tests.near_misses.common import NearMiss
from tests.zoo.common import D, E
from tests.zoo.merged import Merged, MergedLoop, MergedOfHit, MergedStacked


class OfItsTokens(Merged):
    """The thin matrices count as much as the expert's rows are large."""

    def forward(self, x):
        gate = F.linear(x, self.w1.weight + self.delta() * x.square().mean())
        return self.w2(self.act_fn(gate) * self.w3(x))


class OfItsNumberOfTokens(Merged):
    """The thin matrices count the less, the more tokens an expert has."""

    def forward(self, x):
        gate = F.linear(x, self.w1.weight + self.delta() / (1 + x.shape[0]))
        return self.w2(self.act_fn(gate) * self.w3(x))


class Dropped(Merged):
    """Entries of the product are dropped at random."""

    def delta(self):
        return F.dropout(super().delta(), 0.5)


class Detached(Merged):
    """What is merged gets no gradient."""

    def delta(self):
        return super().delta().detach()


class WrittenInPlace(Merged):
    """The matrix of the module is merged for good."""

    def forward(self, x):
        with torch.no_grad():
            self.w1.weight.add_(self.delta())
        return super().forward(x)


class Remembered(Merged):
    """The expert keeps what it merged."""

    def delta(self):
        self.merged = super().delta()
        return self.merged


class OtherScales(MergedLoop):
    """Each expert has a scale of its own, a number."""

    def __init__(self):
        super().__init__()
        for e, expert in enumerate(self.experts):
            expert.scale = 0.5 + e


class OneUnmerged(MergedLoop):
    """The last expert merges nothing."""

    def __init__(self):
        super().__init__()
        self.experts[-1].delta = lambda: 0.0


class TiedThinMatrix(MergedLoop):
    """Two of the experts share a thin matrix."""

    def __init__(self):
        super().__init__()
        self.experts[1].lora_a = self.experts[0].lora_a


class OfTheNextExpert(MergedStacked):
    """The thin matrices of two experts are multiplied."""

    def merged(self, e):
        return self.up[e] + 0.5 * self.lora_b[e] @ self.lora_a[(e + 1) % E]


class OfTheSum(MergedStacked):
    """An expert's matrix has what all experts before it merged."""

    def forward(self, hidden_states):
        self.total = 0.0
        return super().forward(hidden_states)

    def merged(self, e):
        self.total = self.total + self.lora_b[e] @ self.lora_a[e]
        return self.up[e] + self.total


class OfTheNextHit(MergedOfHit):
    """The thin matrices of two experts are multiplied, in a loop over those that were hit."""

    def merged(self, e):
        return self.up[e] + 0.5 * self.lora_b[e] @ self.lora_a[(e + 1) % E]


class OfTheSumOfHits(MergedOfHit):
    """An expert's matrix has what all experts with a token before it merged."""

    def forward(self, hidden_states):
        self.total = 0.0
        return super().forward(hidden_states)

    def merged(self, e):
        self.total = self.total + self.lora_b[e] @ self.lora_a[e]
        return self.up[e] + self.total


class DroppedOfHit(MergedOfHit):
    """Numbers of what is merged are dropped at random."""

    def merged(self, e):
        return self.up[e] + F.dropout(self.lora_b[e] @ self.lora_a[e], 0.5, self.training)


class BySlot(MergedStacked):
    """A loop over slots and experts: what is added to a matrix fades from slot to slot."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out, shift = torch.zeros_like(x), x.new_ones(())
        for k in range(ids.shape[1]):
            for e in range(E):
                mask = ids[:, k] == e
                matrix = self.up[e] + self.lora_b[e] @ self.lora_a[e] + shift
                out[mask] += F.linear(F.silu(F.linear(x[mask], matrix)), self.down[e]) * weights[mask, k, None]
            shift.mul_(0.5)
        return out.view_as(hidden_states)


class Fading(MergedStacked):
    """What is added to a matrix fades from expert to expert: each has its own matrix all the same."""

    def forward(self, hidden_states):
        self.shift = hidden_states.new_ones(())
        return super().forward(hidden_states)

    def merged(self, e):
        matrix = self.up[e] + self.lora_b[e] @ self.lora_a[e] + self.shift
        self.shift.mul_(0.5)
        return matrix


def block(expert):
    return lambda: MergedLoop(expert)


ROWS, BODIES = "body_is_row_wise", "bodies_are_isomorphic"

MISSES = (
    NearMiss("merged_of_its_tokens", ROWS, block(OfItsTokens)),
    NearMiss("merged_of_its_number_of_tokens", "operations_are_known", block(OfItsNumberOfTokens)),
    NearMiss("merged_dropped", ROWS, block(Dropped)),
    NearMiss("merged_detached", ROWS, block(Detached)),
    NearMiss("merged_written_in_place", "nothing_is_written_inside", block(WrittenInPlace)),
    NearMiss("merged_remembered", "loop_changes_no_python_state", block(Remembered)),
    NearMiss("merged_other_scales", BODIES, OtherScales),
    NearMiss("merged_one_unmerged", BODIES, OneUnmerged),
    NearMiss("merged_tied", BODIES, TiedThinMatrix),
    NearMiss("merged_of_the_next", BODIES, OfTheNextExpert),
    NearMiss("merged_of_the_sum", BODIES, OfTheSum),
    NearMiss("merged_by_slot", "nothing_is_written_inside", BySlot),
    NearMiss("merged_fading", None, Fading, may_rewrite=True),
    NearMiss("merged_of_the_next_hit", "loop_can_be_traced", OfTheNextHit),
    NearMiss("merged_of_the_sum_of_hits", "loop_changes_no_python_state", OfTheSumOfHits),
    NearMiss("merged_dropped_of_hit", ROWS, DroppedOfHit),
)
