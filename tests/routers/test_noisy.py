"""Noisy top-k gating: its noise and its load estimate have the distributions of the paper."""

import pytest
import torch

from scatter_moe.routers import NoisyTopKRouter, cv_squared, importance_loss, tokens_per_expert

D, E, K = 16, 8, 2
DRAWS = 40_000


@pytest.fixture
def router() -> NoisyTopKRouter:
    torch.manual_seed(0)
    router = NoisyTopKRouter(D, E, K, dtype=torch.float64)
    torch.nn.init.normal_(router.weight, std=0.2)
    torch.nn.init.normal_(router.noise_weight, std=0.2)
    return router


def test_noise_is_normal_with_the_scale_of_softplus(router):
    x = torch.randn(D, dtype=torch.float64)
    logits = router(x.expand(DRAWS, D)).logits
    clean, scale = x @ router.weight.T, torch.log1p((x @ router.noise_weight.T).exp())
    standard = (logits - clean) / scale
    # Five standard errors of each estimate: of a mean, of a variance and of a fourth moment of normal numbers.
    assert standard.mean(0).abs().max() < 5 * DRAWS**-0.5
    assert (standard.square().mean(0) - 1).abs().max() < 5 * (2 / DRAWS) ** 0.5
    assert (standard.pow(4).mean(0) - 3).abs().max() < 5 * (96 / DRAWS) ** 0.5
    assert torch.corrcoef(standard.T).fill_diagonal_(0).abs().max() < 5 * DRAWS**-0.5


def test_how_often_each_expert_is_chosen_is_the_mean_of_the_expected_load(router):
    x = torch.randn(D, dtype=torch.float64).expand(DRAWS, D)
    routing = router(x)
    chosen = tokens_per_expert(routing.topk_ids, E) / DRAWS
    expected = router.expected_load(x, routing) / DRAWS
    # The expectation of P(x, i) over everybody's noise is the probability that i is chosen. P's own spread is less than
    # that of a coin with the same probability, so the difference has at most twice a coin's standard error.
    standard_error = (chosen * (1 - chosen) / DRAWS).sqrt()
    assert ((chosen - expected).abs() < 5 * 2 * standard_error).all()
    assert chosen.max() - chosen.min() > 0.1  # the test would see experts mixed up


def test_expected_load_is_the_probability_of_staying_in_when_ones_own_noise_is_drawn_again(router):
    x = torch.randn(1, D, dtype=torch.float64)
    routing = router(x)
    clean, scale = x @ router.weight.T, router.noise_scale(x)
    again = clean + torch.randn(DRAWS, E, dtype=torch.float64) * scale
    for expert in range(E):
        logits = routing.logits.expand(DRAWS, E).clone()
        logits[:, expert] = again[:, expert]
        share = (logits.topk(K).indices == expert).any(-1).double().mean()
        expected = router.expected_load(x, routing)[expert]
        assert abs(share - expected) < 5 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-12


def test_evaluation_draws_no_noise(router):
    x = torch.randn(5, D, dtype=torch.float64)
    router.eval()
    assert torch.equal(router(x).logits, x @ router.weight.T)


def test_weights_are_the_softmax_over_the_chosen(router):
    routing = router(torch.randn(64, D, dtype=torch.float64))
    kept = torch.full_like(routing.logits, -torch.inf).scatter(1, routing.topk_ids, routing.logits.topk(K).values)
    torch.testing.assert_close(routing.topk_weights, kept.softmax(-1).gather(1, routing.topk_ids))


def test_training_starts_with_equal_loads():
    torch.manual_seed(0)
    router = NoisyTopKRouter(D, E, K)
    chosen = tokens_per_expert(router(torch.randn(DRAWS, D)).topk_ids, E) / DRAWS
    assert (chosen - K / E).abs().max() < 5 * (K / E / DRAWS) ** 0.5


class Losses(torch.nn.Module):
    """Both balance losses, with the same noise in each call."""

    def __init__(self, router: NoisyTopKRouter) -> None:
        super().__init__()
        self.router = router

    def forward(self, x):
        torch.manual_seed(1)
        routing = self.router(x)
        return importance_loss(routing), cv_squared(self.router.expected_load(x, routing))


def test_gradients_of_both_losses(router):
    x = torch.randn(64, D, dtype=torch.float64)
    names = [f"router.{name}" for name, _ in router.named_parameters()]

    def losses(*parameters):
        return torch.func.functional_call(Losses(router), dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(losses, tuple(router.parameters()))
    for loss in losses(*router.parameters()):
        assert all(
            grad.abs().max() > 0 for grad in torch.autograd.grad(loss, list(router.parameters()), retain_graph=True)
        )


def test_choosing_all_experts_is_refused():
    with pytest.raises(ValueError, match=r"top_k: got 8, accepted are 1\.\.7"):
        NoisyTopKRouter(D, E, E)
