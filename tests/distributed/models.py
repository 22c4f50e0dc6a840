"""A small model of dense layers and MoE layers, in float64, and the ways to lay it out on four processes.

T tokens of a rank, K experts per token, E experts, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from scatter_moe import ExpertMLP, ExpertParallel, MoE
from scatter_moe.distributed.expert_parallel import Kind
from scatter_moe.routers import Routing, TopKRouter
from tests.distributed.layouts import D
from tests.distributed.pool import WORLD_SIZE

MOST_TOKENS = 8


class DrawnRouter(nn.Module):
    """Sends tokens where it is told to, `ids [T, K]`; the weights are its own and are trained."""

    ids: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(D, num_experts)

    def forward(self, x: Tensor) -> Routing:
        logits = self.gate(x)
        return Routing(logits.softmax(-1).gather(1, self.ids), self.ids, logits)


class Block(nn.Module):
    def __init__(self, num_experts: int, top_k: int, drawn: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        router = DrawnRouter(num_experts) if drawn else TopKRouter(D, num_experts, top_k)
        self.moe = MoE(router, ExpertMLP(num_experts, D, 4, layout="interleaved"))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    def __init__(self, num_experts: int = 7, top_k: int = 2, num_blocks: int = 2, drawn: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.blocks = nn.Sequential(*[Block(num_experts, top_k, drawn) for _ in range(num_blocks)])
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


def model(**settings: int) -> Model:
    torch.manual_seed(0)
    return Model(**settings).double()


def tokens(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """x and what the model is to give; their number differs by rank and step, and may be zero."""
    generator = torch.Generator().manual_seed(WORLD_SIZE * step + rank)
    x, target = torch.randn(2, (rank + step) % MOST_TOKENS, D, dtype=torch.float64, generator=generator)
    return x, target


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().sum() / MOST_TOKENS


def divide_experts(model: Model, mesh, exchange: Kind) -> None:
    parallelize_module(model, mesh, {"blocks.*.moe": ExpertParallel(exchange, max_tokens=MOST_TOKENS)})


def ep(exchange: Kind, **settings: int) -> nn.Module:
    """Experts on all four; dense parameters are plain tensors whose gradients `train` averages."""
    layers = model(**settings)
    divide_experts(layers, init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("ep",)), exchange)
    return layers


def tp(exchange: Kind, **settings: int) -> nn.Module:
    """Columns of every expert on all four, which have the same tokens."""
    return ep_and_tp(exchange, 1, **settings)


def ep_and_tp(exchange: Kind, num_parts: int = 2, **settings: int) -> nn.Module:
    """Experts on two, the columns of each on the two ranks of the other dimension, which have the same tokens."""
    layers = model(**settings)
    shape = (num_parts, WORLD_SIZE // num_parts)
    divide_experts(layers, init_device_mesh("cpu", shape, mesh_dim_names=("ep", "tp")), exchange)
    return layers


def ep_and_fsdp(exchange: Kind, **settings: int) -> nn.Module:
    """Experts on two, sharded by FSDP over the other dimension; everything else sharded over all four."""
    layers = model(**settings)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    everyone = mesh["fsdp", "ep"]._flatten("dp")
    divide_experts(layers, mesh["ep"], exchange)
    for block in layers.blocks:
        fully_shard(block.moe.experts, mesh=mesh["fsdp"])
        fully_shard(block, mesh=everyone)
    return fully_shard(layers, mesh=everyone)


def ep_and_ddp(exchange: Kind, **settings: int) -> nn.Module:
    """Experts on all four; DDP averages the gradients of everything else."""
    layers = ep(exchange, **settings)
    experts = [name for name, _ in layers.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(layers, experts)
    return DistributedDataParallel(layers)


def fsdp(exchange: Kind, **settings: int) -> nn.Module:
    """FSDP2 alone, block by block."""
    layers = model(**settings)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,), mesh_dim_names=("dp",))
    for block in layers.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(layers, mesh=mesh)


PARALLEL: dict[str, Callable[..., nn.Module]] = {
    "EP": ep,
    "TP": tp,
    "EP and TP": ep_and_tp,
    "EP and FSDP2": ep_and_fsdp,
    "EP and DDP": ep_and_ddp,
    "FSDP2": fsdp,
}
# How many ranks have the same tokens: those of the "tp" dimension, which comes last.
SAME_TOKENS = {"TP": WORLD_SIZE, "EP and TP": 2}
