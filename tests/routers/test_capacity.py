"""Capacity: no slot is lost, nobody is over capacity, priority is kept, dropped tokens are exactly on the residual."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from scatter_moe.routers import (
    CapacityRouter,
    GShardRouter,
    Routing,
    SwitchRouter,
    TopKRouter,
    expert_capacity,
    limit_capacity,
    pass_overflow,
)


@st.composite
def routings(draw) -> tuple[Routing, int, int]:
    """A routing of G groups with a few sentinels, E and G."""
    num_experts, groups = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    top_k, per_group = draw(st.integers(1, num_experts)), draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_tokens = groups * per_group
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    weights, ids = logits.softmax(-1).topk(top_k)
    unused = torch.rand(num_tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    return Routing(weights.masked_fill(unused, 0), ids + num_experts * unused, logits), num_experts, groups


def by_priority(routing: Routing, priority: str, groups: int) -> list[list[tuple[int, int]]]:
    """The slots (token, choice) of each group, first come first, as a loop would visit them."""
    num_tokens, top_k = routing.topk_ids.shape
    size = num_tokens // groups
    visits = []
    for group in range(groups):
        tokens = list(range(group * size, (group + 1) * size))
        if priority == "weight":
            tokens.sort(key=lambda token: -routing.topk_weights[token].max().item())
        if priority == "token":
            visits.append([(token, choice) for token in tokens for choice in range(top_k)])
        else:
            visits.append([(token, choice) for choice in range(top_k) for token in tokens])
    return visits


@settings(max_examples=150, deadline=None)
@given(routings(), st.integers(0, 6), st.sampled_from(["choice", "token", "weight"]))
def test_capacity_is_what_a_loop_over_slots_gives(case, capacity, priority):
    routing, num_experts, groups = case
    limited = limit_capacity(routing, num_experts, capacity, priority=priority, groups=groups)
    ids, weights = routing.topk_ids.clone(), routing.topk_weights.clone()
    for visits in by_priority(routing, priority, groups):
        taken = [0] * num_experts
        for slot in visits:
            expert = int(ids[slot])
            if expert >= num_experts:
                continue
            if taken[expert] == capacity:
                ids[slot], weights[slot] = num_experts + expert, 0
            else:
                taken[expert] += 1
    assert torch.equal(limited.topk_ids, ids)
    assert torch.equal(limited.topk_weights, weights)
    assert limited.logits is routing.logits


@settings(max_examples=50, deadline=None)
@given(routings(), st.integers(0, 6))
def test_no_slot_is_lost_and_nobody_is_over_capacity(case, capacity):
    routing, num_experts, groups = case
    limited = limit_capacity(routing, num_experts, capacity, groups=groups)
    assert torch.equal(limited.topk_ids % num_experts, routing.topk_ids % num_experts)
    for group in limited.topk_ids.view(groups, -1):
        assert all((group == expert).sum() <= capacity for expert in range(num_experts))


@settings(max_examples=50, deadline=None)
@given(routings())
def test_enough_capacity_changes_nothing(case):
    routing, num_experts, groups = case
    limited = limit_capacity(routing, num_experts, routing.topk_ids.numel(), groups=groups)
    assert all(torch.equal(new, old) for new, old in zip(limited, routing, strict=True))


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 16), st.integers(1, 400))
def test_expert_capacity_has_no_rounding_error(num_tokens, num_experts, top_k, percent):
    exact = ceil(Fraction(percent, 100) * top_k * num_tokens / num_experts)
    assert expert_capacity(num_tokens, num_experts, top_k, percent / 100) == exact


def test_dropped_tokens_are_exactly_on_the_residual():
    torch.manual_seed(0)
    num_tokens, width, num_experts = 64, 16, 4
    router = CapacityRouter(TopKRouter(width, num_experts, 2), capacity_factor=0.5)
    x, up = torch.randn(num_tokens, width), torch.randn(num_experts, 32, width)
    down = torch.randn(num_experts, width, 32)
    routing = router(x)
    order, offsets = torch.ops.scatter_moe.route(routing.topk_ids, num_experts)
    y = torch.ops.scatter_moe.mlp(
        x, routing.topk_weights, order, offsets, [up], [], [down], [], [], [], "silu", "plain"
    )
    dropped = (routing.topk_ids >= num_experts).all(-1)
    assert dropped.any() and not dropped.all()
    assert torch.equal((x + y)[dropped], x[dropped])
    passed = pass_overflow(y, x, routing.topk_ids, num_experts)
    assert torch.equal(passed[dropped], x[dropped])
    assert torch.equal(passed[~dropped], y[~dropped])
    assert (y[~dropped] != 0).all(-1).all()


def test_dropped_slots_have_no_gradient():
    torch.manual_seed(0)
    router = CapacityRouter(TopKRouter(16, 4, 2), capacity_factor=0.5)
    routing = router(torch.randn(64, 16))
    dropped = routing.topk_ids >= 4
    (grad,) = torch.autograd.grad(routing.topk_weights[dropped].sum(), router.router.weight, retain_graph=True)
    assert (grad == 0).all()
    (grad,) = torch.autograd.grad(routing.topk_weights[~dropped].square().sum(), router.router.weight)
    assert grad.abs().max() > 0


def test_groups_with_capacity_are_transformers_switch_router():
    torch.manual_seed(0)
    batch, length, width, num_experts = 3, 24, 16, 4
    config = SwitchTransformersConfig(
        d_model=width, num_experts=num_experts, expert_capacity=6, router_jitter_noise=0.0
    )
    theirs = SwitchTransformersTop1Router(config)
    router = CapacityRouter(SwitchRouter(width, num_experts), capacity_factor=1.0)
    theirs.classifier.load_state_dict(router.router.state_dict())
    x = torch.randn(batch, length, width)
    chosen = next(tensor for tensor in theirs(x) if not tensor.is_floating_point())
    if chosen.dim() == 4:
        pytest.skip("this transformers counts each token's own choice alone: nothing is ever over capacity")
    routing = router(x, groups=batch)
    assert torch.equal((routing.topk_ids < num_experts)[:, 0], chosen.reshape(batch * length, -1).any(-1))
    assert (routing.topk_ids >= num_experts).any()


def test_evaluation_may_have_a_factor_of_its_own():
    torch.manual_seed(0)
    router = CapacityRouter(GShardRouter(16, 4), capacity_factor=0.5, eval_capacity_factor=4.0)
    x = torch.randn(64, 16)
    assert (router(x).topk_ids[:, 0] >= 4).any()
    assert (router.eval()(x).topk_ids < 4).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CapacityRouter(SwitchRouter(8, 4), 0.0), "capacity_factor: got 0.0"),
        (lambda: CapacityRouter(SwitchRouter(8, 4), priority="first"), "priority: got 'first'"),
        (lambda: CapacityRouter(SwitchRouter(8, 4))(torch.randn(5, 8), groups=2), "groups: got 2"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
