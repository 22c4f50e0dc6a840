"""Losses are those of their papers and of transformers."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from scatter_moe.routers import (
    Routing,
    cv_squared,
    importance_loss,
    limit_capacity,
    load_balancing_loss,
    router_z_loss,
    tokens_per_expert,
)
from tests.numerics import assert_exact

T, E, K, B = 96, 8, 2, 4


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(T, E) + torch.linspace(-2, 2, E)).requires_grad_()


def check(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor) -> None:
    names = ("loss", "gradient")
    assert_exact(
        dict(zip(names, (ours, *torch.autograd.grad(ours, logits, retain_graph=True)), strict=True)),
        dict(zip(names, (theirs, *torch.autograd.grad(theirs, logits, retain_graph=True)), strict=True)),
    )


def test_load_balancing_is_mixtrals_divided_by_k(logits):
    ours = load_balancing_loss(logits, logits.topk(K).indices)
    check(ours, load_balancing_loss_func((logits,), E, K) / K, logits)


def test_padding_does_not_count(logits):
    mask = torch.arange(T) % 3 > 0
    ours = load_balancing_loss(logits, logits.topk(K).indices, mask=mask)
    check(ours, load_balancing_loss_func((logits,), E, K, mask.view(1, T).long()) / K, logits)
    check(ours, load_balancing_loss(logits[mask], logits[mask].topk(K).indices), logits)


def test_sequences_are_averaged_as_in_switch(logits):
    ours = load_balancing_loss(logits, logits.topk(1).indices, sequences=B)
    nested = logits.view(B, T // B, E)
    check(ours, switch.load_balancing_loss_func(nested.softmax(-1), nested.argmax(-1)), logits)


def test_sequence_wise_loss_of_deepseek_v3(logits):
    ids = logits.topk(K).indices
    mask = torch.ones(T, dtype=torch.bool)
    mask[: T // B // 2] = False  # half of the first sequence
    ours = load_balancing_loss(logits, ids, score="sigmoid", sequences=B, mask=mask)
    losses = []
    for sequence in range(B):
        tokens = [t for t in range(sequence * T // B, (sequence + 1) * T // B) if mask[t]]
        scores = logits[tokens].sigmoid()
        p = (scores / scores.sum(-1, keepdim=True)).mean(0)  # equations 19 and 20
        f = torch.stack([(ids[tokens] == expert).sum() * E / (K * len(tokens)) for expert in range(E)])  # 18
        losses.append((f * p).sum())  # 17
    check(ours, torch.stack(losses).mean(), logits)


def test_even_load_costs_one():
    logits = torch.zeros(E, E)
    ids = torch.stack([torch.arange(E), torch.arange(E).roll(1)], -1)
    assert load_balancing_loss(logits, ids).item() == pytest.approx(1.0)


def test_slots_over_capacity_still_count_for_the_expert_they_wanted(logits):
    weights, ids = logits.softmax(-1).topk(K)
    limited = limit_capacity(Routing(weights, ids, logits), E, capacity=3)
    assert (limited.topk_ids >= E).any()
    assert torch.equal(load_balancing_loss(logits, limited.topk_ids), load_balancing_loss(logits, ids))


def test_all_padding_gives_zero(logits):
    nothing = torch.zeros(T, dtype=torch.bool)
    assert load_balancing_loss(logits, logits.topk(K).indices, mask=nothing) == 0
    assert router_z_loss(logits, nothing) == 0


def test_z_loss_is_switchs(logits):
    check(router_z_loss(logits), switch.router_z_loss_func(logits[None]), logits)
    mask = torch.arange(T) % 3 > 0
    check(router_z_loss(logits, mask), switch.router_z_loss_func(logits[mask][None]), logits)


def test_importance_is_the_squared_coefficient_of_variation(logits):
    weights, ids = logits.softmax(-1).topk(K)
    routing = limit_capacity(Routing(weights, ids, logits), E, capacity=10)
    importance = torch.stack([routing.topk_weights[routing.topk_ids == expert].sum() for expert in range(E)])
    check(importance_loss(routing), importance.var(correction=0) / importance.mean() ** 2, logits)


def test_equal_loads_vary_by_nothing():
    assert cv_squared(torch.full((E,), 7)) == 0


def test_tokens_per_expert_counts_ids_in_range():
    ids = torch.tensor([[0, 2], [2, 5], [-1, 3]])
    assert tokens_per_expert(ids, 4).tolist() == [1, 0, 2, 1]


def test_losses_of_bfloat16_logits_are_float32(logits):
    low = logits.detach().bfloat16()
    assert load_balancing_loss(low, low.topk(K).indices).dtype == router_z_loss(low).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"), [({"score": "tanh"}, "score: got 'tanh'"), ({"sequences": 5}, "sequences: got 5")]
)
def test_wrong_arguments_are_named(logits, settings, message):
    with pytest.raises(ValueError, match=message):
        load_balancing_loss(logits, logits.topk(K).indices, **settings)
