"""On the CPU in float32 the fused expert rounds as a loop over the experts does in autograd.

For two experts a token, and rows that begin at multiples of 64 bytes: MKL rounds by them, too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import OPS

T, D, WIDTH, E, K = 100, 32, 16, 5, 2


def loop(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, choice = torch.where(topk_ids == e)
        gate, up = F.linear(x[tokens], gate_up[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down[e])
        out = out.index_add(0, tokens, y * topk_weights[tokens, choice, None])
    return out


def fused(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    routing = OPS.route(topk_ids, E)
    return OPS.mlp(x, topk_weights, *routing, [gate_up], [], [down], [], [], [], "silu", "concatenated")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_output_and_gradients_of_the_tokens_are_those_of_a_loop(compiled: bool):
    torch.manual_seed(0)
    x, topk_ids = torch.randn(T, D), torch.rand(T, E).topk(K).indices
    tensors = [x, torch.rand(T, K), torch.randn(E, 2 * WIDTH, D) / D**0.5, torch.randn(E, D, WIDTH) / WIDTH**0.5]
    x, topk_weights, gate_up, down = (tensor.requires_grad_() for tensor in tensors)
    grad = torch.randn(T, D)
    ours = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused

    def results(function) -> list[Tensor]:
        out = function(x, topk_weights, topk_ids, gate_up, down)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    names = ("output", "gradient of x", "gradient of topk_weights", "gradient of gate_up", "gradient of down")
    for name, mine, theirs in zip(names, results(ours), results(loop), strict=True):
        assert torch.equal(mine, theirs), name
