"""DeepSeek-V3's router and the update of its bias."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from scatter_moe.routers import SigmoidRouter, tokens_per_expert
from tests.numerics import assert_exact

T, D, E, K = 128, 32, 16, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (4, 2), (8, 3)])
def test_it_is_deepseek_v3s_router(num_groups, topk_groups, renormalize):
    config = DeepseekV3Config(
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=num_groups,
        topk_group=topk_groups,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = SigmoidRouter(D, E, K, num_groups=num_groups, topk_groups=topk_groups, renormalize=renormalize, scale=2.5)
    torch.nn.init.normal_(ours.correction_bias, std=0.2)
    theirs.load_state_dict({"weight": ours.weight, "e_score_correction_bias": ours.correction_bias})
    x = torch.randn(T, D, requires_grad=True)
    _, weights, ids = theirs(x)
    routing = ours(x)

    # Theirs doesn't sort a token's experts.
    by_id, their_by_id = routing.topk_ids.argsort(-1), ids.argsort(-1)
    assert torch.equal(routing.topk_ids.gather(1, by_id), ids.gather(1, their_by_id))
    assert not torch.equal(routing.topk_ids.sort().values, routing.logits.topk(K).indices.sort().values)
    mine, their = routing.topk_weights.gather(1, by_id), weights.gather(1, their_by_id)
    upstream = torch.randn(T, K)
    grads = torch.autograd.grad(mine, (x, ours.weight), upstream)
    their_grads = torch.autograd.grad(their, (x, theirs.weight), upstream)
    names = ("weights", "dx", "dweight")
    assert_exact(dict(zip(names, (mine, *grads), strict=True)), dict(zip(names, (their, *their_grads), strict=True)))


def test_experts_come_from_the_best_groups_alone():
    router = SigmoidRouter(D, E, K, num_groups=4, topk_groups=2)
    groups = router(torch.randn(T, D)).topk_ids // (E // 4)
    assert all(len(set(row)) <= 2 for row in groups.tolist())


def test_bias_update_balances_the_load():
    router = SigmoidRouter(D, E, K)
    with torch.no_grad():
        router.weight[0] = router.weight.mean(0) + 0.5  # expert 0 is everybody's favourite
    x = torch.randn(512, D).abs()
    before = tokens_per_expert(router(x).topk_ids, E)
    for _ in range(300):
        router.update_correction_bias(tokens_per_expert(router(x).topk_ids, E), rate=0.01)
    after = tokens_per_expert(router(x).topk_ids, E)
    assert before.max() == 512
    assert after.max() < 1.5 * 512 * K / E
    assert after.min() > 0.5 * 512 * K / E


def test_bias_update_is_one_signed_step():
    router = SigmoidRouter(D, 4, 1)
    router.update_correction_bias(torch.tensor([10, 0, 4, 2]), rate=0.001)  # the mean is 4
    assert router.correction_bias.tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.001])
    with pytest.raises(ValueError, match=r"tokens_per_expert: got shape \[3\], accepted is \[4\]"):
        router.update_correction_bias(torch.tensor([1, 2, 3]))


def test_bias_stays_float32_in_a_bfloat16_model():
    router = SigmoidRouter(D, E, K)
    torch.nn.init.normal_(router.correction_bias)
    exact = router.correction_bias.clone()
    model = torch.nn.Sequential(router).bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(model[0].correction_bias, exact)
    assert "0.correction_bias" in model.state_dict()
    assert router.to("meta").correction_bias.is_meta


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 3}, "num_groups: got 3"),
        ({"num_groups": 16}, "num_groups: got 16"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups: got 5"),
        ({"num_groups": 8, "topk_groups": 1}, "top_k: got 4, accepted are 1..2"),
    ],
)
def test_wrong_groups_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SigmoidRouter(D, E, K, **settings)
