"""Two GPUs with NCCL against one process on the CPU in float64: exchanges, tensor parallelism, FSDP2 x EP, CUDA graphs.

T tokens of a rank, K experts per token, E experts, D model width, F expert width.
"""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import scatter_moe
from scatter_moe import ExpertMLP, ExpertParallel, MoE
from scatter_moe.routers import TopKRouter
from tests.distributed.pool import Pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANKS, D, F, E, K = 2, 64, 48, 7, 3
MOST_TOKENS, STEPS = 200, 5
DEVICE = "cuda"


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    pool = Pool("nccl", RANKS)
    yield pool
    pool.close()


@dataclasses.dataclass
class Batch:
    x: Tensor
    ids: Tensor
    weights: Tensor
    upstream: Tensor

    def on_gpu(self) -> "Batch":
        return Batch(
            self.x.detach().float().to(DEVICE).requires_grad_(),
            self.ids.to(DEVICE),
            self.weights.detach().float().to(DEVICE).requires_grad_(),
            self.upstream.float().to(DEVICE),
        )


def batch(rank: int, num_tokens: int, last_expert: int = E) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    x, upstream = torch.randn(2, num_tokens, D, dtype=torch.float64, generator=generator)
    ids = torch.rand(num_tokens, last_expert, generator=generator).argsort(1)[:, :K]
    weights = torch.rand(num_tokens, K, dtype=torch.float64, generator=generator)
    return Batch(x.requires_grad_(), ids, weights.requires_grad_(), upstream)


def experts(layout: str = "concatenated") -> ExpertMLP:
    torch.manual_seed(0)
    return ExpertMLP(E, D, F, bias=True, layout=layout, dtype=torch.float64)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """float32: 2e-5 of each tensor's largest value."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = 2e-5 * max(1e-30, tensor.abs().max().item() if tensor.numel() else 0)
        given = got[name].cpu().double()
        torch.testing.assert_close(given, tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


TOKENS = {
    "the same": (150, 150, E),
    "different": (200, 17, E),
    "none on one rank": (0, 90, E),
    "to one rank": (60, 80, K),
}


def expected_of(name: str, module: ExpertMLP) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    *counts, last_expert = TOKENS[name]
    ranks = []
    for rank, count in enumerate(counts):
        given = batch(rank, count, last_expert)
        y = module(given.x, given.ids, given.weights)
        y.backward(given.upstream)
        ranks.append({"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad})
    return ranks, {name: parameter.grad / RANKS for name, parameter in module.named_parameters()}


def exchange_on_rank(exchange: str, name: str) -> dict[str, Tensor]:
    mesh = init_device_mesh(DEVICE, (RANKS,))
    module = experts().float().to(DEVICE)
    parallelize_module(module, mesh, ExpertParallel(exchange, max_tokens=MOST_TOKENS))
    *counts, last_expert = TOKENS[name]
    given = batch(dist.get_rank(), counts[dist.get_rank()], last_expert).on_gpu()
    y = module(given.x, given.ids, given.weights)
    y.backward(given.upstream)
    grads = {name: full(parameter.grad).cpu() for name, parameter in module.named_parameters()}
    return {"y": y.detach().cpu(), "x": given.x.grad.cpu(), "weights": given.weights.grad.cpu(), **grads}


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("name", TOKENS)
def test_exchanges_equal_one_process(gpus, exchange, name):
    ranks, grads = expected_of(name, experts())
    for got, of_rank in zip(gpus.run(exchange_on_rank, exchange, name), ranks, strict=True):
        assert_close(got, of_rank | grads)


def columns_on_rank() -> dict[str, Tensor]:
    """The operator's own rules: the same tokens on both, columns of the experts on each."""
    mesh = init_device_mesh(DEVICE, (RANKS,))
    module = experts("separate").float().to(DEVICE)
    dims = {"gate_proj": 1, "up_proj": 1, "down_proj": 2, "gate_proj_bias": 1, "up_proj_bias": 1}
    sharded: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        placement = Shard(dims[name]) if name in dims else Replicate()
        sharded[name] = distribute_tensor(parameter.detach(), mesh, [placement]).requires_grad_()
    given = batch(0, 100).on_gpu()
    x, ids, weights = (
        distribute_tensor(tensor.detach(), mesh, [Replicate()]) for tensor in (given.x, given.ids, given.weights)
    )
    x.requires_grad_(), weights.requires_grad_()
    order, offsets = torch.ops.scatter_moe.route(ids, E)
    names = ("gate_proj", "up_proj", "down_proj", "gate_proj_bias", "up_proj_bias", "down_proj_bias")
    parameters = [[sharded[name]] for name in names]
    y = torch.ops.scatter_moe.mlp(x, weights, order, offsets, *parameters, "silu", "separate").full_tensor()
    y.backward(given.upstream)
    grads = {name: full(tensor.grad).cpu() for name, tensor in sharded.items()}
    return {"y": y.detach().cpu(), "x": full(x.grad).cpu(), "weights": full(weights.grad).cpu(), **grads}


def test_columns_equal_one_process(gpus):
    module, given = experts("separate"), batch(0, 100)
    y = module(given.x, given.ids, given.weights)
    y.backward(given.upstream)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    for got in gpus.run(columns_on_rank):
        assert_close(got, {"y": y.detach(), "x": given.x.grad, "weights": given.weights.grad} | grads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.moe = MoE(TopKRouter(D, E, K), ExpertMLP(E, D, F))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(D, D), Block()).double()


def x_and_target(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    x, target = torch.randn(2, 100 + 50 * rank, D, dtype=torch.float64, generator=generator)
    return x, target


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().sum() / MOST_TOKENS


def train_on_rank(exchange: Any) -> dict[str, Tensor]:
    model = blocks().float().to(DEVICE)
    mesh = init_device_mesh(DEVICE, (1, RANKS), mesh_dim_names=("fsdp", "ep"))
    everyone = mesh["fsdp", "ep"]._flatten("dp")
    for index in (0, 2):
        parallelize_module(model[index].moe, mesh["ep"], ExpertParallel(exchange, max_tokens=MOST_TOKENS))
        fully_shard(model[index].moe.experts, mesh=mesh["fsdp"])
        fully_shard(model[index], mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, *(tensor.float().to(DEVICE) for tensor in x_and_target(dist.get_rank(), step))).backward()
        scatter_moe.clip_grad_norm_(model, 0.05)
        optimizer.step()
    return {name: full(parameter).cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_steps_of_fsdp_and_ep_equal_one_process(gpus, exchange):
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            (loss(model, *x_and_target(rank, step)) / RANKS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for got in gpus.run(train_on_rank, exchange):
        assert_close(got, expected)


def divided_layers() -> tuple[nn.Sequential, DeviceMesh]:
    model = blocks().float().to(DEVICE)
    mesh = init_device_mesh(DEVICE, (RANKS,))
    for index in (0, 2):
        parallelize_module(model[index].moe, mesh, ExpertParallel("all_gather"))
    return model, mesh


def tokens(step: int) -> Tensor:
    return x_and_target(0, 10 * step + dist.get_rank())[0].float().to(DEVICE)


def compiled_on_rank() -> int:
    """Inductor against eager on changing routing; the number of graphs."""
    model, _ = divided_layers()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(3):
        results = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(tokens(step))
            y.square().sum().backward()
            grads = {name: full(parameter.grad).cpu().double() for name, parameter in model.named_parameters()}
            results.append({"y": y.detach().cpu().double()} | copy.deepcopy(grads))
        assert_close(results[1], results[0])
    return counter.frame_count


def test_all_gather_compiles_to_one_graph(gpus):
    assert gpus.run(compiled_on_rank) == [1] * RANKS


def recorded_on_rank() -> None:
    """A CUDA graph of forward replays with other tokens, and so with other routing."""
    model, _ = divided_layers()
    x = tokens(0)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = model(x)
        for step in range(1, 4):
            x.copy_(tokens(step))
            graph.replay()
            assert torch.equal(y, model(x))


def test_all_gather_is_recorded_in_a_cuda_graph(gpus):
    gpus.run(recorded_on_rank)
