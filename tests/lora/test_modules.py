"""LoRA on experts that are modules of their own: peft's layers stand in each body, and the rewrite takes them along."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten

peft = pytest.importorskip("peft")

T, K, E, D, WIDTH = 24, 2, 4, 16, 12


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rewritten_with_adapters(dtype):
    fresh_dynamo()
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(Block().to(dtype), config, autocast_adapter_dtype=False)
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    actual = observe(compile_ours(model, fullgraph=True), model, x)
    assert_same(actual, observe(model, model, x))
    assert rewritten() == 1 and len(graphs) == 1
    trained = [name for name, grad in actual.grads.items() if grad is not None and name.startswith("base")]
    assert len(trained) == 4 * E  # A and B of two layers an expert, and nothing of the frozen ones
    products = [node for node in graphs[0].graph.nodes if "parallel_linear" in str(node.target)]
    assert len(products) == 6
