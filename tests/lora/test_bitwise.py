"""On the CPU in float32 experts with LoRA round as peft and transformers do together, forward and backward.

For the sizes and the alignment of `tests/ops/test_bitwise.py`: enough rows an expert that its sum takes less time than
thin products.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.backend.harness import compile_ours, fresh_dynamo, rewritten  # noqa: E402
from tests.ops.test_bitwise import D, E, T, experts, mixtral, qwen3_moe  # noqa: E402

K, RANK = 2, 4


class Block(nn.Module):
    def __init__(self, make: Callable[[str], nn.Module], implementation: str) -> None:
        super().__init__()
        self.experts = experts(make, implementation)

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.experts(*arguments)


def adapted(make: Callable[[str], nn.Module], implementation: str) -> nn.Module:
    """Adapters as large as the weights, with a scale that is no power of two."""
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(
        Block(make, implementation), peft.LoraConfig(r=RANK, lora_alpha=6, target_parameters=targets)
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


WAYS = {
    "backend": lambda make: compile_ours(adapted(make, "eager"), fullgraph=True),
    "experts implementation": lambda make: adapted(make, "scatter_moe"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_output_and_gradients_are_those_of_peft(make: Callable[[str], nn.Module], way: str):
    fresh_dynamo()
    generator = torch.Generator().manual_seed(1)
    topk_ids = torch.rand(T, E, generator=generator).topk(K).indices
    x, topk_weights, grad = (torch.randn(T, size, generator=generator) for size in (D, K, D))

    def results(model: nn.Module) -> dict[str, Tensor]:
        inputs = {"x": x.clone().requires_grad_(), "topk_weights": topk_weights.clone().requires_grad_()}
        out = model(inputs["x"], topk_ids, inputs["topk_weights"])
        trained = {name[-40:]: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == 4
        grads = torch.autograd.grad(out, [*inputs.values(), *trained.values()], grad)
        return {"output": out, **dict(zip([*inputs, *trained], grads, strict=True))}

    ours, theirs = results(WAYS[way](make)), results(adapted(make, "eager"))
    assert rewritten() == (way == "backend")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
