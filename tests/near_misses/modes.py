"""Grad mode and autocast that change within the loop."""

from functools import partial

import torch
from torch import nn

from tests.near_misses.common import Loop, NearMiss, RangeLoop, hits
from tests.zoo.common import D, E
from tests.zoo.masks import MaskLoop


class NoGradOnOne(Loop):
    """Expert 0 does not learn."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            with torch.set_grad_enabled(e > 0):
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class NoGradOnOneHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            with torch.set_grad_enabled(bool(e > 0)):
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class NoGradOnAll(Loop):
    """Experts do not learn, the router does."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            with torch.no_grad():
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class NoGradOnAllHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            with torch.no_grad():
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class AddsUnrecorded(RangeLoop):
    """What the experts are added to in place keeps its own history."""

    def forward(self, hidden_states):
        x, weights, mask, _ = self.start(hidden_states)
        out = x * weights[:, :1]
        with torch.no_grad():
            for e in range(self.num_experts):
                slots, tokens = torch.where(mask[e])
                out.index_add_(0, tokens, self.value(x, weights, tokens, slots, e))
        return out


class AssignsUnrecorded(MaskLoop):
    """So does what their rows are assigned to."""

    def moe(self, x, ids, weights):
        out = x * weights[:, :1]
        with torch.no_grad():
            for e, expert in enumerate(self.experts):
                tokens = torch.where(ids[:, 0] == e)[0]
                out[tokens] = expert(x[tokens])
        return out


class NoGradWeights(Loop):
    """The router's weights are read under no_grad."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            with torch.no_grad():
                weight = weights[tokens, slots, None]
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weight)
        return out


class DetachedWeights(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None].detach())
        return out


class DetachOnOne(Loop):
    """Expert 0's output is cut off."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            y = self.experts[e](x[tokens])
            if e == 0:
                y = y.detach()
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class AutocastOnExperts(Loop):
    """Experts in bfloat16, router and sum in float32."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y.float() * weights[tokens, slots, None])
        return out


class AutocastOnExpertsHit(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.experts[e](x[tokens])
            out.index_add_(0, tokens, y.float() * weights[tokens, slots, None])
        return out


class AutocastOnOne(Loop):
    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=e == 1):
                y = self.experts[e](x[tokens]).float()
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out


class NoGradOnParameter(RangeLoop):
    """The experts' matrices are read under no_grad: `cut` does that."""

    def __init__(self, cut):
        super().__init__()
        self.more = nn.Parameter(torch.empty(E, D, D))
        self.cut = cut

    def value(self, x, weights, tokens, slots, e):
        with torch.no_grad():
            cut = self.cut(self.more[e])
        return self.expert(x[tokens], e) @ cut * weights[tokens, slots, None]


class UnderGrad(RangeLoop):
    """The derivative of a loop by the scale of its input, by a transform."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)

        def loss(scale):
            return super(UnderGrad, self).forward(x * scale).square().sum()

        return x * torch.func.grad(loss)(torch.ones(()))


MISSES = (
    NearMiss("range_no_grad_on_one", "grad_mode_is_constant", NoGradOnOne),
    NearMiss("hit_no_grad_on_one", "loop_can_be_traced", NoGradOnOneHit),
    NearMiss("range_no_grad_on_all", "grad_mode_is_constant", NoGradOnAll),
    NearMiss("hit_no_grad_on_all", "grad_mode_is_constant", NoGradOnAllHit),
    NearMiss("range_adds_unrecorded", "grad_mode_is_constant", AddsUnrecorded),
    NearMiss("range_assigns_unrecorded", "grad_mode_is_constant", AssignsUnrecorded),
    NearMiss("range_no_grad_weights", "grad_mode_is_constant", NoGradWeights),
    NearMiss("hit_detached_weights", "body_is_row_wise", DetachedWeights),
    NearMiss("range_detach_on_one", "bodies_are_isomorphic", DetachOnOne),
    NearMiss("range_autocast_on_experts", "autocast_is_constant", AutocastOnExperts),
    NearMiss("hit_autocast_on_experts", "autocast_is_constant", AutocastOnExpertsHit),
    NearMiss("range_autocast_on_one", "autocast_is_constant", AutocastOnOne),
    NearMiss("range_no_grad_on_parameter", "grad_mode_is_constant", partial(NoGradOnParameter, lambda p: p)),
    NearMiss("range_no_grad_on_transposed", "grad_mode_is_constant", partial(NoGradOnParameter, lambda p: p.t())),
    NearMiss("range_under_grad", "no_function_transform", UnderGrad),
)
