"""Every router compiles as one graph, under stock Inductor and under the backend, and exports."""

import copy

import pytest
import torch

from scatter_moe.routers import (
    CapacityRouter,
    GShardRouter,
    NoisyTopKRouter,
    SigmoidRouter,
    SwitchRouter,
    TopKRouter,
    load_balancing_loss,
    router_z_loss,
)
from tests.numerics import assert_exact

T, D, E = 24, 16, 8
ROUTERS = {
    "softmax-before": lambda: TopKRouter(D, E, 2),
    "softmax-after": lambda: TopKRouter(D, E, 2, softmax="after", bias=True),
    "switch": lambda: SwitchRouter(D, E, jitter=0.1),
    "sigmoid": lambda: SigmoidRouter(D, E, 3, num_groups=4, topk_groups=2),
    "noisy": lambda: NoisyTopKRouter(D, E, 2),
    "gshard": lambda: GShardRouter(D, E),
    "capacity": lambda: CapacityRouter(TopKRouter(D, E, 2), 0.75),
    "capacity-by-weight": lambda: CapacityRouter(GShardRouter(D, E), 0.75, priority="weight"),
}


@pytest.fixture(params=ROUTERS.values(), ids=ROUTERS.keys())
def router(request) -> torch.nn.Module:
    torch.compiler.reset()
    torch.manual_seed(0)
    router = request.param()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return router


class Losses(torch.nn.Module):
    """A router with its losses: what a training step makes of it."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x):
        routing = self.router(x)
        loss = load_balancing_loss(routing.logits, routing.topk_ids) + router_z_loss(routing.logits)
        return routing, loss + routing.topk_weights.square().sum()


def step(model, parameters, x) -> tuple[torch.Tensor, dict]:
    """The ids and everything that has a rounding in a training step, with the same random numbers each time."""
    torch.manual_seed(1)
    routing, loss = model(x)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    named = {"weights": routing.topk_weights, "logits": routing.logits, "loss": loss}
    return routing.topk_ids, named | {f"gradient {i}": grad for i, grad in enumerate(grads)}


def assert_compiled_equals_eager(router, **options) -> None:
    model = Losses(router)
    compiled = torch.compile(model, fullgraph=True, **options)
    parameters = list(model.parameters())
    for num_tokens in (T, T + 8):
        x = torch.randn(num_tokens, D)
        (ids, results), (eager_ids, eager) = step(compiled, parameters, x), step(model, parameters, x)
        assert torch.equal(ids, eager_ids)
        assert_exact(results, eager)


def test_it_is_one_graph_with_the_random_numbers_of_eager(router):
    assert_compiled_equals_eager(router, backend="aot_eager")


def test_it_is_one_graph_under_the_backend(router):
    assert_compiled_equals_eager(router, backend="scatter_moe", options={"inner_backend": "aot_eager"})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "scatter_moe"])
def test_it_is_one_graph_under_inductor(router, backend):
    assert_compiled_equals_eager(router.eval(), backend=backend)  # Inductor draws other random numbers than eager


@pytest.mark.parametrize("strict", [True, False])
def test_it_exports_with_a_dynamic_number_of_tokens(router, strict):
    router.eval()
    program = torch.export.export(
        router, (torch.randn(T, D),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=2**20)},), strict=strict
    )
    x = torch.randn(T + 8, D)
    exported, eager = program.module()(x), router(x)
    assert torch.equal(exported.topk_ids, eager.topk_ids)
    assert_exact(
        {"weights": exported.topk_weights, "logits": exported.logits},
        {"weights": eager.topk_weights, "logits": eager.logits},
    )


def test_state_dict_round_trip(router):
    x = torch.randn(T, D)
    other = copy.deepcopy(router)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(router.state_dict())
    for a, b in zip(router.eval()(x), other.eval()(x), strict=True):
        assert torch.equal(a, b)
