"""GShard's second expert is used as often as its weight says."""

import pytest
import torch
from transformers import NllbMoeConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from scatter_moe.routers import GShardRouter
from tests.numerics import assert_exact

D, E = 16, 8
DRAWS = 40_000


@pytest.fixture
def router() -> GShardRouter:
    torch.manual_seed(0)
    return GShardRouter(D, E)


def test_second_choice_is_used_with_twice_its_weight(router):
    x = torch.randn(20, D)
    exact = router.eval()(x)
    probability = 2 * exact.topk_weights[:, 1]
    assert probability.min() < 0.4 and probability.max() > 0.9  # all sorts of tokens
    routing = router.train()(x.repeat(DRAWS // 20, 1))
    used = (routing.topk_ids[:, 1] < E).view(-1, 20).double().mean(0)
    standard_error = (probability * (1 - probability) / (DRAWS // 20)).sqrt()
    assert ((used - probability).abs() < 5 * standard_error).all()


def test_first_choice_is_always_used_with_its_weight(router):
    x = torch.randn(256, D)
    exact, routing = router.eval()(x), router.train()(x)
    assert torch.equal(routing.topk_ids[:, 0], exact.topk_ids[:, 0])
    assert torch.equal(routing.topk_weights[:, 0], exact.topk_weights[:, 0])


def test_an_unused_second_choice_is_a_sentinel_without_weight_and_gradient(router):
    x = torch.randn(256, D)
    routing = router(x)
    unused = routing.topk_ids[:, 1] >= E
    assert unused.any() and not unused.all()
    assert torch.equal(routing.topk_ids[:, 1] % E, router.eval()(x).topk_ids[:, 1])
    assert (routing.topk_weights[unused, 1] == 0).all()
    assert (routing.topk_weights[~unused, 1] > 0).all()
    (grad,) = torch.autograd.grad(routing.topk_weights[unused, 1].sum(), router.weight)
    assert (grad == 0).all()


def test_it_is_nllb_moes_top2_router_in_evaluation(router):
    config = NllbMoeConfig(
        d_model=D,
        num_experts=E,
        router_bias=False,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        moe_eval_capacity_token_fraction=1.0,
    )
    theirs = NllbMoeTop2Router(config).eval()
    theirs.classifier.load_state_dict(router.state_dict())
    x = torch.randn(64, D)
    routing = router.eval()(x)
    _, dense, _ = (tensor for tensor in theirs(x))
    assert_exact({"weights": routing.topk_weights}, {"weights": dense.gather(1, routing.topk_ids)})
    assert torch.equal(dense.count_nonzero(-1), torch.full((64,), 2))
