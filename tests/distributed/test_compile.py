"""torch.compile of a model whose experts are divided by the all-gather exchange."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from scatter_moe import ExpertParallel
from tests.distributed.layouts import D
from tests.distributed.models import model
from tests.distributed.pool import WORLD_SIZE

NUM_TOKENS = 8


def results(compiled, layers, step: int) -> dict[str, Tensor]:
    layers.zero_grad()
    generator = torch.Generator().manual_seed(WORLD_SIZE * step + dist.get_rank())
    x = torch.randn(NUM_TOKENS, D, dtype=torch.float64, generator=generator, requires_grad=True)
    y = compiled(x)
    y.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads}


def compile_on_rank(style: dict[str, Any], backend: str, columns: int) -> int:
    """Compiled against eager on changing routing; the number of graphs that were compiled."""
    torch._dynamo.reset()
    layers = model()
    mesh = init_device_mesh("cpu", (WORLD_SIZE // columns, columns), mesh_dim_names=("ep", "tp"))
    parallelize_module(layers, mesh if columns > 1 else mesh["ep"], {"blocks.*.moe": ExpertParallel(**style)})
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layers, backend=counter, fullgraph=True)
    for step in range(5):
        expected = results(layers, layers, step)
        for name, tensor in results(compiled, layers, step).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    return counter.frame_count


@pytest.mark.parametrize(
    ("style", "backend", "columns"),
    [
        ({"exchange": "auto", "max_tokens": NUM_TOKENS + 3}, "aot_eager", 1),
        pytest.param({"exchange": "all_gather"}, "inductor", 1, marks=pytest.mark.slow),
        pytest.param({"exchange": "all_gather"}, "aot_eager", 2, marks=pytest.mark.slow),
    ],
    ids=["auto-aot_eager", "all_gather-inductor", "all_gather-columns"],
)
def test_all_gather_compiles_to_one_graph_and_never_again(pool, style, backend, columns):
    assert pool.run(compile_on_rank, style, backend, columns) == [1] * WORLD_SIZE
