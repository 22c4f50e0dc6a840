"""On the CPU in float32 the fused expert rounds as transformers' loop over the experts does, forward and backward.

For rows that begin at multiples of 64 bytes, since MKL rounds by them, too, and enough tokens for a product an expert.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from tests.backend.harness import compile_ours, fresh_dynamo, rewritten
from tests.ops.cases import OPS

T, D, WIDTH, E = 100, 32, 16, 5


def qwen3_moe(implementation: str) -> nn.Module:
    settings: dict[str, Any] = {"hidden_size": D, "moe_intermediate_size": WIDTH, "num_experts": E}
    settings["experts_implementation"] = implementation
    return Qwen3MoeExperts(Qwen3MoeConfig(**settings))


def mixtral(implementation: str) -> nn.Module:
    settings: dict[str, Any] = {"hidden_size": D, "intermediate_size": WIDTH, "num_local_experts": E}
    settings["experts_implementation"] = implementation
    return MixtralExperts(MixtralConfig(**settings))


def experts(make: Callable[[str], nn.Module], implementation: str) -> nn.Module:
    module, generator = make(implementation), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return module


class Operator(nn.Module):
    """A call of the operator in the place of the experts' loop."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = module.gate_up_proj, module.down_proj

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        weights = [self.gate_up_proj], [], [self.down_proj]
        return OPS.mlp(x, topk_weights, *OPS.route(topk_ids, E), *weights, [], [], [], "silu", "concatenated")


WAYS = {
    "operator": lambda make: Operator(experts(make, "eager")),
    "backend": lambda make: compile_ours(experts(make, "eager"), fullgraph=True),
    "experts implementation": lambda make: experts(make, "scatter_moe"),
}


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_output_and_gradients_are_those_of_the_loop(make: Callable[[str], nn.Module], way: str, K: int):
    fresh_dynamo()
    generator = torch.Generator().manual_seed(1)
    topk_ids = torch.rand(T, E, generator=generator).topk(K).indices
    x, topk_weights, grad = (torch.randn(T, size, generator=generator) for size in (D, K, D))

    def results(module: nn.Module) -> dict[str, Tensor]:
        inputs = {"x": x.clone().requires_grad_(), "topk_weights": topk_weights.clone().requires_grad_()}
        out = module(inputs["x"], topk_ids, inputs["topk_weights"])
        tensors = [*inputs.values(), *module.parameters()]
        names = [*inputs, "gate_up_proj", "down_proj"]
        return {"output": out, **dict(zip(names, torch.autograd.grad(out, tensors, grad), strict=True))}

    ours, theirs = results(WAYS[way](make)), results(experts(make, "eager"))
    assert rewritten() == (way == "backend")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
