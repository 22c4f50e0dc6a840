"""An expert's own parameters, taken or multiplied with in a way that no rule speaks of."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from tests.near_misses.common import NearMiss, RangeLoop
from tests.zoo import bodies
from tests.zoo.common import FF, D, E
from tests.zoo.parameters import Biases
from tests.zoo.stacked import TopKRouter
from tests.zoo.views import Enumerated, Halves, Segments, Unbound


class HalfOfTheBias(Biases):
    """`addmm` counts the bias half."""

    def down(self, h, e):
        return torch.addmm(self.down_bias[e], h, self.experts.down_proj[e].t(), beta=0.5)


class SummedOverTokens(Biases):
    """An einsum that sums over the rows."""

    def down(self, h, e):
        return super().down(h, e) + torch.einsum("tf,df->d", h, self.experts.down_proj[e])


class OneColumnRepeated(Biases):
    """An einsum that repeats one column of the rows for all that it sums over."""

    def down(self, h, e):
        return torch.einsum("tf,df->td", h[:, :1], self.experts.down_proj[e])


class WhereBothHold(Biases):
    """What `&` makes of two masks, which it doesn't write to, is multiplied with."""

    def down(self, h, e):
        return super().down(h * ((h > 0) & (h < 1)), e)


class NextBias(Biases):
    """Each expert has the bias of the next."""

    def down(self, h, e):
        return torch.mm(h, self.experts.down_proj[e].t()) + self.down_bias[(e + 1) % E, None]


class NextHalf(Halves):
    """The second half is that of the next expert."""

    def halves(self, w, e):
        return w[e][:FF], w[(e + 1) % E][FF:]


class LaterHalf(Halves):
    """Each expert's half begins one row after that of the one before."""

    def halves(self, w, e):
        return w[e, e : FF + e], w[e, FF:]


class LastTwice(Halves):
    """The last expert but one serves two ids."""

    def halves(self, w, e):
        return w[min(e, E - 2), :FF], w[min(e, E - 2), FF:]


class OneSwapped(Halves):
    """Gate and up of one expert are swapped."""

    def halves(self, w, e):
        first, second = w[e].chunk(2)
        return (second, first) if e == 1 else (first, second)


class HalfWritten(Halves):
    """A half is scaled in place, for good."""

    def halves(self, w, e):
        w[e][:FF].mul_(1.5)
        return super().halves(w, e)

    @torch.no_grad()
    def forward(self, hidden_states):
        return super().forward(hidden_states)


class HalfDetached(Halves):
    """A half gets no gradient."""

    def halves(self, w, e):
        return w[e][:FF].detach(), w[e][FF:]


class HalfWithoutGrad(Halves):
    """A half is taken while nothing is recorded."""

    def halves(self, w, e):
        with torch.no_grad():
            gate = w[e][:FF]
        return gate, w[e][FF:]


class ShiftedSegments(Segments):
    """Segments begin one row late; the last has one row less, and one of the first."""

    def expert(self, x, e):
        up = self.up.roll(-1, 0)[e * FF : (e + 1) * FF] if e else self.up[1 : FF + 1]
        return super().expert(x, e) + F.silu(x @ up.t()) @ self.down[:FF]


class ShortSegments(Segments):
    """The first half alone is cut into segments."""

    def expert(self, x, e):
        up, down = (w[e * FF // 2 : (e + 1) * FF // 2] for w in (self.up, self.down))
        return F.silu(x @ up.t()) @ down


class UnboundInReverse(Unbound):
    """Each expert has the weights of its opposite."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e, down in enumerate(self.experts.down_proj.unbind(0)[::-1]):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, F.linear(x[tokens].repeat(1, 2)[:, :FF], down) * weights[tokens, slots, None])
        return out


class OneBias(nn.Module):
    """The same bias for all columns."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(D, D)), nn.Parameter(torch.empty(1))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class TwoStacks(Enumerated):
    """Two stacks, each of which is one expert's, in a loop over them both."""

    def __init__(self):
        super().__init__()
        self.gate = TopKRouter(num_experts=2)
        self.first, self.second = nn.Parameter(torch.empty(2, D, D)), nn.Parameter(torch.empty(2, D, D))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, weights, ids = self.gate(x)
        out = torch.zeros_like(x)
        for e, w in enumerate((self.first * 1, self.second * 1)):
            tokens, slots = torch.where(ids == e)
            y = F.linear(F.linear(x[tokens], w[0]).relu(), w[1])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class TurnedScale(RangeLoop):
    """A norm over two dims, of which the scale has them the other way round."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(E, 2, D // 2))

    def value(self, x, weights, tokens, slots, e):
        y = self.expert(x[tokens], e).reshape(-1, D // 2, 2)
        return F.layer_norm(y, (D // 2, 2), self.scale[e].t()).reshape(-1, D) * weights[tokens, slots, None]


MISSES = (
    NearMiss("parameters_half_of_the_bias", "body_is_row_wise", HalfOfTheBias),
    NearMiss("parameters_summed_over_tokens", "body_is_row_wise", SummedOverTokens),
    NearMiss("parameters_one_column_repeated", "body_is_row_wise", OneColumnRepeated),
    NearMiss("parameters_where_both_hold", "body_is_row_wise", WhereBothHold),
    NearMiss("parameters_next_bias", "bodies_are_isomorphic", NextBias),
    NearMiss("parameters_next_half", "bodies_are_isomorphic", NextHalf),
    NearMiss("parameters_later_half", "bodies_are_isomorphic", LaterHalf),
    NearMiss("parameters_last_half_twice", "bodies_are_isomorphic", LastTwice),
    NearMiss("parameters_one_half_swapped", "bodies_are_isomorphic", OneSwapped),
    NearMiss("parameters_half_written", "nothing_is_written_inside", HalfWritten),
    NearMiss("parameters_half_detached", "body_is_row_wise", HalfDetached),
    NearMiss("parameters_half_without_grad", "grad_mode_is_constant", HalfWithoutGrad),
    NearMiss("parameters_shifted_segments", "bodies_are_isomorphic", ShiftedSegments),
    NearMiss("parameters_short_segments", "every_expert_is_covered", ShortSegments, may_rewrite=True),
    NearMiss("parameters_unbound_in_reverse", "bodies_are_isomorphic", UnboundInReverse, may_rewrite=True),
    NearMiss("parameters_one_bias", "body_is_row_wise", partial(bodies.RangeLoop, OneBias), may_rewrite=True),
    NearMiss("parameters_turned_scale", "body_is_row_wise", TurnedScale, may_rewrite=True),
    NearMiss("parameters_of_two_stacks", "body_is_row_wise", TwoStacks, may_rewrite=True),
)
