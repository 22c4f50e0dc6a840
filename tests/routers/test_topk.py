"""Top-k softmax routers are those of Mixtral, GPT-OSS and Switch."""

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, SwitchTransformersConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from scatter_moe.routers import SwitchRouter, TopKRouter
from tests.numerics import assert_exact

T, D, E, K = 64, 32, 8, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gradients(routing_weights: torch.Tensor, upstream: torch.Tensor, inputs: tuple) -> dict:
    return dict(zip(("x", "weight", "bias"), torch.autograd.grad(routing_weights, inputs, upstream), strict=False))


def test_softmax_before_topk_is_mixtrals_router():
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))
    ours = TopKRouter(D, E, K)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, D, requires_grad=True)
    logits, weights, ids = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.topk_ids, ids)
    upstream = torch.randn(T, K)
    assert_exact(
        {"weights": routing.topk_weights, "logits": routing.logits}
        | gradients(routing.topk_weights, upstream, (x, ours.weight)),
        {"weights": weights, "logits": logits} | gradients(weights, upstream, (x, theirs.weight)),
    )


def test_softmax_after_topk_is_gpt_oss_router():
    theirs = GptOssTopKRouter(GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K))
    ours = TopKRouter(D, E, K, softmax="after", bias=True)
    torch.nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, D, requires_grad=True)
    _, weights, ids = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.topk_ids, ids)
    upstream = torch.randn(T, K)
    assert_exact(
        {"weights": routing.topk_weights} | gradients(routing.topk_weights, upstream, (x, ours.weight, ours.bias)),
        {"weights": weights} | gradients(weights, upstream, (x, theirs.weight, theirs.bias)),
    )


def test_both_orders_agree_when_renormalised():
    before, after = TopKRouter(D, E, K), TopKRouter(D, E, K, softmax="after")
    after.load_state_dict(before.state_dict())
    x = torch.randn(T, D)
    assert torch.equal(before(x).topk_ids, after(x).topk_ids)
    assert_exact({"weights": after(x).topk_weights}, {"weights": before(x).topk_weights})


def test_without_renormalisation_weights_are_probabilities():
    router = TopKRouter(D, E, K, renormalize=False)
    routing = router(torch.randn(T, D))
    assert torch.equal(routing.topk_weights, routing.logits.softmax(-1).gather(1, routing.topk_ids))
    assert (routing.topk_weights.sum(-1) < 1).all()


def test_switch_is_transformers_top1_router():
    config = SwitchTransformersConfig(d_model=D, num_experts=E, expert_capacity=T, router_jitter_noise=0.0)
    theirs = SwitchTransformersTop1Router(config).eval()
    ours = SwitchRouter(D, E)
    theirs.classifier.load_state_dict(ours.state_dict())
    x = torch.randn(1, T, D)
    chosen, probabilities = sorted(theirs(x)[:2], key=torch.is_floating_point)  # 5.17 returns them the other way round
    routing = ours(x)
    assert torch.equal(routing.topk_ids, chosen.reshape(T, E).argmax(-1, keepdim=True))
    assert_exact({"weights": routing.topk_weights}, {"weights": probabilities.reshape(T, 1)})


def test_leading_dimensions_become_tokens():
    router = TopKRouter(D, E, K)
    x = torch.randn(2, 5, D)
    for nested, flat in zip(router(x), router(x.reshape(10, D)), strict=True):
        assert torch.equal(nested, flat)


def test_a_router_in_float32_scores_bfloat16_inputs_in_float32():
    router = TopKRouter(D, E, K)
    x = torch.randn(T, D, dtype=torch.bfloat16)
    routing = router(x)
    assert routing.logits.dtype == routing.topk_weights.dtype == torch.float32
    assert torch.equal(routing.logits, x.float() @ router.weight.T)


def test_logits_dtype_wins_over_the_weights_dtype():
    router = TopKRouter(D, E, K, dtype=torch.bfloat16, logits_dtype=torch.float32)
    x = torch.randn(T, D, dtype=torch.bfloat16)
    assert torch.equal(router(x).logits, x.float() @ router.weight.float().T)


def test_jitter_stays_within_its_bounds_and_out_of_evaluation():
    router = SwitchRouter(D, D, jitter=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(D))
    x = torch.ones(4096, D)
    logits = router(x).logits
    assert logits.min() >= 0.9 and logits.max() <= 1.1
    assert logits.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.01)  # of a uniform distribution 0.2 wide
    assert torch.equal(router.eval()(x).logits, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKRouter(D, E, 0), "top_k: got 0"),
        (lambda: TopKRouter(D, E, E + 1), "top_k: got 9"),
        (lambda: TopKRouter(D, E, K, jitter=1.5), "jitter: got 1.5"),
        (lambda: TopKRouter(D, E, K, softmax="both"), "softmax: got 'both'"),
        (lambda: TopKRouter(D, E, K, softmax="after", renormalize=False), "renormalize: got False"),
        (lambda: TopKRouter(D, E, K)(torch.randn(T, D + 1)), "x: got width 33"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
