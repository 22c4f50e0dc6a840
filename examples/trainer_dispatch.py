"""A trainer that dispatches rows itself, as torchtitan does, with `ExpertMLP.forward_grouped` as its inner experts.

    python examples/trainer_dispatch.py [--steps 60]
    torchrun --nproc-per-node 2 examples/trainer_dispatch.py

Such a trainer sorts the tokens by expert, sends them to the ranks that hold the experts, and calls the inner experts as
`experts(rows, num_tokens_per_expert)`. Its `ParallelStyle` makes their parameters DTensors, sharded by experts. Neither
knows what computes the rows: the loop over experts here, or the operators of this library in its place.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from scatter_moe import ExpertMLP

WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K, TOKENS = 32, 64, 8, 2, 256


class LoopedExperts(nn.Module):
    """The trainer's own: one expert after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(EXPERTS, EXPERT_WIDTH, WIDTH))
        self.up = nn.Parameter(torch.empty(EXPERTS, EXPERT_WIDTH, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, EXPERT_WIDTH))

    def forward(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        gate, up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.gate, self.up, self.down))
        results = []
        for e, x in enumerate(rows.split(num_tokens_per_expert.tolist())):
            results.append(F.linear(F.silu(F.linear(x, gate[e])) * F.linear(x, up[e]), down[e]))
        return torch.cat(results)


class GroupedExperts(nn.Module):
    """This library's, called as the trainer calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = ExpertMLP(EXPERTS, WIDTH, EXPERT_WIDTH, layout="separate")

    def forward(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        return self.mlp.forward_grouped(rows, num_tokens_per_expert)


class DispatchedMoE(nn.Module):
    """The trainer's layer: router, rows sorted by expert, inner experts, rows added up."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        order = ids.flatten().argsort(stable=True)
        tokens, counts = order // TOP_K, ids.flatten().bincount(minlength=EXPERTS)
        y = self.experts(x[tokens], counts) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, tokens, y)


class TrainerExpertParallel(ParallelStyle):
    """The trainer's own style: rows to their experts before the module, and back after it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._shard, self._dispatch, self._combine)

    @staticmethod
    def _shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))

    def _dispatch(self, module: nn.Module, inputs: tuple[Tensor, Tensor], mesh: DeviceMesh) -> Any:
        rows, counts_E = inputs
        received = torch.empty_like(counts_E)
        dist.all_to_all_single(received, counts_E, group=mesh.get_group())
        self.sent = counts_E.view(mesh.size(), -1).sum(1).tolist()
        by_rank = received.view(mesh.size(), -1)
        self.received = by_rank.sum(1).tolist()
        rows = transfer(rows, self.received, self.sent, mesh)
        experts = torch.arange(by_rank.shape[1], device=rows.device).repeat(mesh.size()).repeat_interleave(received)
        self.by_expert = experts.argsort(stable=True)  # they come sorted by rank, then by expert
        return rows[self.by_expert], by_rank.sum(0)

    def _combine(self, module: nn.Module, rows: Tensor, mesh: DeviceMesh) -> Any:
        return transfer(rows[self.by_expert.argsort()], self.sent, self.received, mesh)


def transfer(rows: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    functional = torch.ops._c10d_functional
    started = functional.all_to_all_single(rows.contiguous(), received, sent, mesh.get_group().group_name)
    return functional.wait_tensor(started)


def train(experts: nn.Module, mesh: DeviceMesh | None, steps: int) -> list[float]:
    """The losses of each step. The same layer and, on each rank, the same tokens whatever the experts are."""
    torch.manual_seed(0)
    model = DispatchedMoE(experts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    if mesh is not None:
        parallelize_module(model, mesh, {"experts": TrainerExpertParallel()})
    torch.manual_seed(1 + (dist.get_rank() if mesh is not None else 0))
    x = torch.randn(TOKENS, WIDTH)
    target, losses = x.roll(1, dims=-1).sin(), []
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (model.router, model.experts)]
    for _ in range(steps):
        loss = F.mse_loss(model(x), target)
        loss.backward()
        if mesh is not None:
            dist.all_reduce(model.router.weight.grad, op=dist.ReduceOp.SUM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps, mesh = parser.parse_args().steps, None
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    looped, grouped = (train(experts(), mesh, steps) for experts in (LoopedExperts, GroupedExperts))
    if mesh is None or dist.get_rank() == 0:
        console = Console()
        console.print(f"loss with the trainer's experts: {looped[0]:.4f} to {looped[-1]:.4f}")
        console.print(f"loss with this library's:        {grouped[0]:.4f} to {grouped[-1]:.4f}")
        difference = max(abs(a - b) for a, b in zip(looped, grouped, strict=True))
        console.print(f"largest difference of the loss in {steps} steps: {difference:.1e}")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
