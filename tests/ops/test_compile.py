"""Under torch.compile: one graph, the same results, and a number of tokens that changes without recompiling."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from tests.numerics import assert_exact
from tests.ops.cases import OPS

TOKENS = (7, 12, 33)
E, D, F = 4, 5, 3


class Block(torch.nn.Module):
    """Experts from ids to output, written with the general operators or with mlp, stacked or as lists of parameters."""

    def __init__(self, fused: bool, as_list: bool):
        super().__init__()
        self.fused, num_tensors = fused, E if as_list else 1
        shape = () if as_list else (E,)
        generator = torch.Generator().manual_seed(0)

        def parameters(*sizes):
            tensors = [torch.randn(*shape, *sizes, generator=generator) for _ in range(num_tensors)]
            return torch.nn.ParameterList([torch.nn.Parameter(tensor) for tensor in tensors])

        self.gate_up, self.down = parameters(2 * F, D), parameters(D, F)
        self.bias, self.scale = parameters(2 * F), parameters(D)

    def forward(self, x, ids, topk_weights):
        top_k = ids.shape[1]
        routing = OPS.route(ids, E)
        gate_up, down, bias = list(self.gate_up), list(self.down), list(self.bias)
        if self.fused:
            return OPS.mlp(x, topk_weights, *routing, gate_up, [], down, bias, [], [], "silu", "concatenated")
        rows = OPS.dispatch(x, *routing, top_k)
        gate, up = OPS.parallel_linear(rows, gate_up, *routing, top_k, True, True, bias).chunk(2, dim=-1)
        rows = torch.nn.functional.silu(gate) * up
        y = OPS.parallel_linear(rows, down, *routing, top_k, True, False, [])
        y = y * OPS.combine(OPS.expand(list(self.scale), routing[1], len(rows)), None, *routing, 1, True)
        return OPS.combine(y, topk_weights, *routing, top_k, False)


def inputs(num_tokens, device):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, D, generator=generator)
    scores = torch.rand(num_tokens, E, generator=generator).topk(2)
    return x.to(device).requires_grad_(), scores.indices.to(device), scores.values.to(device).requires_grad_()


def outcome(function, block, x, ids, topk_weights):
    """Output and gradients of inputs and parameters."""
    out = function(x, ids, topk_weights)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    named = {"x": x, "topk_weights": topk_weights, **dict(block.named_parameters())}
    grads = torch.autograd.grad(out, list(named.values()), upstream, allow_unused=True)
    return {"output": out.detach()} | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("as_list", [False, True], ids=["stacked", "list"])
@pytest.mark.parametrize("fused", [False, True], ids=["general", "mlp"])
@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "mark_dynamic"])
def test_tokens_change_without_recompiling(fused, as_list, marked, device):
    torch._dynamo.reset()
    block, counter = Block(fused, as_list).to(device), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=None if marked else True)
    for num_tokens in TOKENS:
        given = inputs(num_tokens, device)
        if marked:
            for tensor in given:
                torch._dynamo.mark_dynamic(tensor, 0)  # an error if tracing fixes the size
        assert_exact(outcome(compiled, block, *given), outcome(block, block, *given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [False, True], ids=["general", "mlp"])
def test_unknown_number_of_tokens(fused, device):
    """Tokens selected by a mask inside the graph: their number is known at run time only."""
    torch._dynamo.reset()
    block = Block(fused, False).to(device)

    def function(x, ids, topk_weights):
        kept = torch.nonzero(x[:, 0] > 0).squeeze(1)
        return x.index_add(0, kept, block(x[kept], ids[kept], topk_weights[kept]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for num_tokens in TOKENS:
            given = inputs(num_tokens, device)
            assert_exact(outcome(compiled, block, *given), outcome(function, block, *given))


@pytest.mark.parametrize("fused", [False, True], ids=["general", "mlp"])
def test_inductor(fused, device):
    torch._dynamo.reset()
    block = Block(fused, True).to(device)
    given = inputs(33, device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    with fresh_cache():  # stock Inductor's keys don't have these operators' sources
        assert_exact(outcome(compiled, block, *given), outcome(block, block, *given))


def test_no_grad_graph_keeps_nothing(device):
    torch._dynamo.reset()
    block, given = Block(True, True).to(device), inputs(7, device)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        block, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend), fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(*given), block(*given))
    (call,) = [node for node in graphs[0].graph.nodes if node.target is OPS.mlp_forward.default]
    assert call.args[-2:] == (False, False)  # save_h, save_y
