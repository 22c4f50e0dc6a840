"""Experts that differ, repeat, share or are missing."""

import warnings
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.near_misses.common import Loop, NearMiss, hits
from tests.near_misses.subclass import ScaledWeight
from tests.zoo.bodies import HitLoop, RangeLoop
from tests.zoo.common import FF, D, SwiGLU


class LastTwice(Loop):
    """Expert E-2 serves two ids."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            expert = self.experts[min(e, self.num_experts - 2)]
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class OneForAll(Loop):
    """One expert serves every id of a hit loop."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[0](x[tokens]) * weights[tokens, slots, None])
        return out


class WithoutLast(Loop):
    """range(E - 1)."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts - 1):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class WithoutFirst(Loop):
    """range(1, E)."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(1, self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class EveryOther(Loop):
    """experts[::2], numbered 0, 1 by enumerate."""

    def forward(self, hidden_states):
        x, ids, weights, _, out = self.begin(hidden_states)
        for e, expert in enumerate(self.experts[::2]):
            tokens, slots = torch.where(ids == e)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class WiderRouter(Loop):
    """The router knows two experts more than there are: their tokens get nothing."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, self.num_experts + 2, bias=False)

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, D)
        _, ids, weights = self.route(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.num_experts + 2).permute(2, 1, 0)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * weights[tokens, slots, None])
        return out


class Reversed(Loop):
    """Expert E-1-e serves id e: a permutation, sound if the weights are permuted as well."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[-1 - e](x[tokens]) * weights[tokens, slots, None])
        return out


class IndexInBody(Loop):
    """The expert's number scales its output."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * (1 + e) * weights[tokens, slots, None])
        return out


class IndexInHitBody(Loop):
    """The loop variable of a hit loop scales the output."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            out.index_add_(0, tokens, self.experts[e](x[tokens]) * (1 + e) * weights[tokens, slots, None])
        return out


class BranchOnIndex(Loop):
    """Expert 0 of a hit loop sees its input doubled."""

    def forward(self, hidden_states):
        x, _, weights, mask, out = self.begin(hidden_states)
        for e in hits(mask):
            slots, tokens = torch.where(mask[e].squeeze(0))
            state = x[tokens] * 2 if e == 0 else x[tokens]
            out.index_add_(0, tokens, self.experts[e](state) * weights[tokens, slots, None])
        return out


class ScaledExpert(SwiGLU):
    """A Python number of its own per expert."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class CastingExpert(SwiGLU):
    """Computes in the dtype of its weights."""

    def forward(self, x):
        return super().forward(x.to(self.w1.weight.dtype)).to(x.dtype)


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def with_scales(loop):
    module = loop(ScaledExpert)
    for e, expert in enumerate(module.experts):
        expert.scale = 1 + 0.25 * e
    return module


def with_tie(loop):
    module = loop()
    module.experts[1].w1.weight = module.experts[0].w1.weight
    return module


def with_shared_expert(loop):
    module = loop()
    module.experts[1] = module.experts[0]
    return module


def with_other_activation(loop):
    module = loop()
    module.experts[2].act_fn = nn.GELU()
    return module


def with_other_width(loop):
    module = loop()
    module.experts[2] = SwiGLU(hidden=FF - 4)
    return module


def with_other_dtype(loop):
    module = loop(CastingExpert)
    module.experts[2].double()
    return module


def with_one_bias(loop):
    module = loop()
    module.experts[2].w2 = nn.Linear(FF, D)
    return module


def with_one_parametrization(loop):
    module = loop()
    parametrize.register_parametrization(module.experts[2].w1, "weight", Twice())
    return module


def with_identity(loop):
    module = loop()
    module.experts[3] = nn.Identity()
    return module


def with_swapped_roles(loop):
    """w1 and w3 of one expert change places: same shapes, another function."""
    module = loop()
    expert = module.experts[1]
    expert.forward = lambda x: expert.w2(expert.act_fn(expert.w3(x)) * expert.w1(x))
    return module


def with_transposed_layout(loop):
    module = loop()
    weight = module.experts[1].w1.weight
    module.experts[1].w1.weight = nn.Parameter(weight.detach().t().contiguous().t())
    return module


def with_subclass(loop):
    module = loop()
    for expert in module.experts:
        expert.w1.weight = nn.Parameter(ScaledWeight(expert.w1.weight.detach().clone(), 0.5))
    return module


def with_one_subclass(loop):
    module = loop()
    linear = module.experts[1].w1
    linear.weight = nn.Parameter(ScaledWeight(linear.weight.detach().clone(), 0.5))
    return module


def with_traced(loop):
    """TorchScript, whose tensors are not where a module keeps its own."""
    module = loop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module.experts = nn.ModuleList(torch.jit.trace(expert, torch.randn(3, D)) for expert in module.experts)
    return module


PER_EXPERT = (
    ("constant_attribute", "bodies_are_isomorphic", with_scales, False),
    ("tied_weight", "bodies_are_isomorphic", with_tie, False),
    ("shared_expert", "bodies_are_isomorphic", with_shared_expert, False),
    ("other_activation", "bodies_are_isomorphic", with_other_activation, False),
    ("other_width", "experts_have_their_own_parameters", with_other_width, False),
    ("other_dtype", "bodies_are_isomorphic", with_other_dtype, False),
    ("one_bias", "bodies_are_isomorphic", with_one_bias, False),
    ("one_parametrization", "bodies_are_isomorphic", with_one_parametrization, False),
    ("one_identity", "bodies_are_isomorphic", with_identity, True),
    ("swapped_roles", "bodies_are_isomorphic", with_swapped_roles, True),
    ("other_layout", "experts_have_their_own_parameters", with_transposed_layout, True),
    ("weight_subclass", "experts_have_their_own_parameters", with_subclass, False),
    ("one_weight_subclass", "experts_have_their_own_parameters", with_one_subclass, False),
    ("traced", "loop_can_be_traced", with_traced, False),
)

MISSES = (
    NearMiss("range_expert_used_twice", "bodies_are_isomorphic", LastTwice),
    NearMiss("hit_one_expert_for_all", "experts_have_their_own_parameters", OneForAll, may_rewrite=True),
    NearMiss("range_without_last", "every_expert_is_covered", WithoutLast, may_rewrite=True),
    NearMiss("range_without_first", "every_expert_is_covered", WithoutFirst, may_rewrite=True),
    NearMiss("range_every_other", "every_expert_is_covered", EveryOther, may_rewrite=True),
    NearMiss("range_wider_router", "every_expert_is_covered", WiderRouter, may_rewrite=True),
    NearMiss("range_reversed", "every_expert_is_covered", Reversed, may_rewrite=True),
    NearMiss("range_index_in_body", "bodies_are_isomorphic", IndexInBody),
    NearMiss("hit_index_in_body", "operations_are_known", IndexInHitBody),
    NearMiss("hit_branch_on_index", "loop_can_be_traced", BranchOnIndex),
    *(NearMiss(f"range_{name}", rule, partial(make, RangeLoop), may) for name, rule, make, may in PER_EXPERT),
    *(NearMiss(f"hit_{name}", rule, partial(make, HitLoop), may) for name, rule, make, may in PER_EXPERT),
)
