"""Trains a small byte-level language model whose experts are divided among processes.

    torchrun --nproc-per-node 2 examples/train_expert_parallel.py            two processes on the CPU, or two GPUs
    torchrun --nproc-per-node 8 examples/train_expert_parallel.py --ep 4     experts on 4, FSDP2 over the other 2

Run it again after a crash: it goes on from its last checkpoint, also with another number of processes.
Shapes: B sequences of a process, S positions, D model width, E experts.
"""

import argparse
import ast
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import scatter_moe
from scatter_moe.routers import TopKRouter

BYTES = 256


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_BSD).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads=4)
        self.moe = scatter_moe.MoE(
            TopKRouter(width, num_experts, top_k), scatter_moe.ExpertMLP(num_experts, width, 2 * width)
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.moe(self.moe_norm(x_BSD))


class LanguageModel(nn.Module):
    def __init__(self, width: int, num_blocks: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList([Block(width, num_experts, top_k) for _ in range(num_blocks)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text_BS: Tensor) -> Tensor:
        x_BSD = self.embed(text_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD))


def parallelize(model: LanguageModel, mesh: DeviceMesh, exchange: str, max_tokens: int) -> None:
    """Experts divided over "ep", each rank's experts sharded over "fsdp", everything else sharded over all ranks."""
    everyone = mesh["fsdp", "ep"]._flatten("dp")
    style = scatter_moe.ExpertParallel(exchange, max_tokens=max_tokens)  # pyright: ignore[reportArgumentType]
    parallelize_module(model, mesh["ep"], {"blocks.*.moe": style})
    for block in model.blocks:
        assert isinstance(block, Block)
        fully_shard(block.moe.experts, mesh=mesh["fsdp"])
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Experts and the rest are on different meshes: in one group each, PyTorch's fused and foreach steps work."""
    experts = list(scatter_moe.expert_parameters(model))
    rest = [parameter for parameter in model.parameters() if not any(parameter is expert for expert in experts)]
    return torch.optim.AdamW([{"params": experts}, {"params": rest}], lr=lr, weight_decay=0.0, fused=True)


def batch(text: Tensor, step: int, settings: argparse.Namespace) -> Tensor:
    """[B, S + 1], drawn by step and rank, so that a resumed run sees what the first would have seen."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - settings.length - 1, (settings.batch, 1), generator=generator)
    return text[starts + torch.arange(settings.length + 1)]


class Checkpoints:
    """Folders step_N and a file that names the last complete one."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self.last = folder / "last"

    def save(self, step: int) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=self.folder / f"step_{step}")
        if dist.get_rank() == 0:
            unfinished = self.last.with_suffix(".new")
            unfinished.write_text(str(step))
            unfinished.replace(self.last)
        dist.barrier()

    def load(self) -> int:
        """How many steps were done."""
        if not self.last.exists():
            return 0
        step = int(self.last.read_text())
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=self.folder / f"step_{step}")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        return step


def train(settings: argparse.Namespace, device: str) -> None:
    world_size = dist.get_world_size()
    ep = settings.ep or world_size
    if world_size % ep:
        raise SystemExit(f"--ep: got {ep}, accepted are divisors of the {world_size} processes")
    mesh = init_device_mesh(device, (world_size // ep, ep), mesh_dim_names=("fsdp", "ep"))
    torch.manual_seed(0)
    model = LanguageModel(settings.width, settings.blocks, settings.experts, settings.top_k).to(device)
    parallelize(model, mesh, settings.exchange, settings.batch * settings.length)
    optimizer = make_optimizer(model, settings.lr)
    checkpoints = Checkpoints(settings.folder, model, optimizer)
    first = checkpoints.load()
    text = torch.frombuffer(bytearray(Path(ast.__file__).read_bytes()), dtype=torch.uint8).long()
    report(f"{world_size} processes on {device}, {ep} for the experts; starting at step {first} of {settings.steps}")
    began = time.perf_counter()
    for step in range(first + 1, settings.steps + 1):
        text_BS = batch(text, step, settings).to(device)
        loss = F.cross_entropy(model(text_BS[:, :-1]).flatten(0, 1), text_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = scatter_moe.clip_grad_norm_(model, max_norm=1.0)
        optimizer.step()
        if step % settings.report_every == 0 or step == settings.steps:
            dist.all_reduce(mean := loss.detach() / world_size)
            rate = (step - first) * text_BS[:, 1:].numel() * world_size / (time.perf_counter() - began)
            report(f"step {step:5d}  loss {mean.item():.4f}  gradient norm {norm.item():.3f}  {rate:,.0f} tokens/s")
        if step % settings.save_every == 0 or step == settings.steps:
            checkpoints.save(step)


def report(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ep", type=int, help="processes that the experts are divided among (all)")
    parser.add_argument("--exchange", choices=["auto", "all_to_all", "all_gather"], default="auto")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a process")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--report-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/expert_parallel"))
    settings = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    try:
        train(settings, "cuda" if on_gpu else "cpu")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
