"""The backend on naive models that DDP or FSDP2 wrap: every layer is rewritten, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import scatter_moe
from tests.distributed.naive import D, model
from tests.distributed.pool import WORLD_SIZE

NUM_TOKENS = 6
pieces: list[torch.fx.GraphModule] = []


def compiler(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
    pieces.append(gm)
    return scatter_moe.backend(gm, example_inputs, options={"inner_backend": "aot_eager"})


compiler.is_scatter_moe = True


def ddp(layers: nn.Sequential, compiled: bool) -> nn.Module:
    wrapped = DistributedDataParallel(layers, bucket_cap_mb=1)
    return torch.compile(wrapped, backend=compiler) if compiled else wrapped


def fsdp_then_compile(layers: nn.Sequential, compiled: bool) -> nn.Module:
    wrapped = fsdp_of_blocks(layers)
    return torch.compile(wrapped, backend=compiler) if compiled else wrapped


def compile_then_fsdp(layers: nn.Sequential, compiled: bool) -> nn.Module:
    for layer in layers if compiled else ():
        layer.compile(backend=compiler)
    return fsdp_of_blocks(layers)


def fsdp_of_blocks(layers: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(layers, mesh=mesh)


def run(layers: nn.Sequential, wrapped: nn.Module) -> dict[str, Tensor]:
    """Three steps; the third rank's tokens all go to the same experts, so that the others get none of its tokens."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    results = {}
    for step in range(3):
        layers.zero_grad()
        x = torch.randn(NUM_TOKENS, D, dtype=torch.float64, generator=generator)
        x = x[:1].expand_as(x) if dist.get_rank() == 2 else x
        y = wrapped(x)
        y.square().sum().backward()
        results[f"y {step}"] = y.detach()
        for name, parameter in layers.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            results[f"{name} {step}"] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return results


def compiled_equals_eager(wrap: Callable[[nn.Sequential, bool], nn.Module]) -> tuple[int, int]:
    """How many layers were rewritten, and how many graphs the backend was given."""
    torch._dynamo.reset()
    counters.clear()
    pieces.clear()
    layers = model()
    expected = run(layers, wrap(layers, False))
    layers = model()
    results = run(layers, wrap(layers, True))
    for name, tensor in results.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    return counters["scatter_moe"]["rewritten"], len(pieces)


@pytest.mark.parametrize("wrap", [ddp, pytest.param(fsdp_then_compile, marks=pytest.mark.slow), compile_then_fsdp])
def test_every_layer_is_rewritten(pool, wrap):
    num_layers = len(model())
    for rewritten, graphs in pool.run(compiled_equals_eager, wrap):
        assert rewritten == num_layers
        assert graphs > 1, "DDP's buckets, or the blocks of FSDP, cut the model"
