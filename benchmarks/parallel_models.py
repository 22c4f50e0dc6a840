"""Training steps of a whole model on several GPUs: experts on every GPU, sharded by FSDP2, or divided among the GPUs.

    torchrun --nproc-per-node 2 -m benchmarks.parallel_models [--tiny]

The model is transformers' Qwen3-MoE with its experts replaced by `ExpertMLP`; every GPU has its own batch. A step is
forward and backward, with gradients averaged over the GPUs except in the first row, where each GPU is alone:

    one GPU          all parameters on every GPU, nothing is sent
    FSDP2            all parameters sharded over all GPUs, and gathered for each layer
    FSDP2 x EP       experts divided among all GPUs, tokens sent to them; the rest sharded over all GPUs

Results are appended to `results/parallel_models.jsonl`, except those of --tiny.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks import models, report
from benchmarks.timing import peak_gib, seconds
from scatter_moe import ExpertMLP, ExpertParallel

VOCABULARY = 32000
TOLERANCE = 1e-2  # relative difference of the losses, bfloat16


def build(tiny: bool) -> nn.Module:
    model = models.build("qwen3", tiny, "eager")
    for layer in layers(model):
        layer.mlp.experts = like(layer.mlp.experts)
    return model


def layers(model: nn.Module) -> list[Any]:
    inner: Any = model.get_submodule("model")
    return list(inner.layers)


def like(experts: Any) -> ExpertMLP:
    """With the parameters of transformers' module, whose layout is the same."""
    num_experts, d_model, d_expert = experts.down_proj.shape
    with torch.device("meta"):
        ours = ExpertMLP(num_experts, d_model, d_expert)
    ours.gate_up_proj, ours.down_proj = experts.gate_up_proj, experts.down_proj
    return ours


def alone(model: nn.Module, mesh: DeviceMesh, num_tokens: int) -> None:
    """Nothing is sent."""


def fsdp(model: nn.Module, mesh: DeviceMesh, num_tokens: int) -> None:
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp_and_ep(exchange: Any) -> Callable[[nn.Module, DeviceMesh, int], None]:
    def parallelize(model: nn.Module, mesh: DeviceMesh, num_tokens: int) -> None:
        for layer in layers(model):
            parallelize_module(layer.mlp.experts, mesh, ExpertParallel(exchange, max_tokens=num_tokens))
            fully_shard(layer, mesh=mesh, ignored_params=set(layer.mlp.experts.parameters()))
        experts = {parameter for layer in layers(model) for parameter in layer.mlp.experts.parameters()}
        fully_shard(model, mesh=mesh, ignored_params=experts)

    return parallelize


ROWS: dict[str, Callable[[nn.Module, DeviceMesh, int], None]] = {
    "one GPU": alone,
    "FSDP2": fsdp,
    "FSDP2 x EP, all_to_all": fsdp_and_ep("all_to_all"),
    "FSDP2 x EP, all_gather": fsdp_and_ep("all_gather"),
}


def measure(name: str, mesh: DeviceMesh, arguments: argparse.Namespace) -> dict[str, Any]:
    model = build(arguments.tiny)
    num_tokens = arguments.batch * arguments.sequence
    ROWS[name](model, mesh, num_tokens)
    torch.manual_seed(1 + dist.get_rank())
    tokens = torch.randint(VOCABULARY, (arguments.batch, arguments.sequence), device=mesh.device_type)

    def step() -> Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    times = []
    for _ in range(arguments.rounds + 2):
        dist.barrier()
        times.append(1e3 * seconds(step))
    step_ms = statistics.median(times[2:])
    rate = 1e3 * num_tokens / step_ms
    row = {"layout": name, "tokens_per_s_per_gpu": rate, "step_ms": step_ms, "peak_gib": peak_gib(step)}
    return row | {"loss": step().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of toy size: does the benchmark itself work?")
    parser.add_argument("--batch", type=int, help="sequences of a GPU (default 4, tiny 2)")
    parser.add_argument("--sequence", type=int, help="tokens a sequence (default 4096, tiny 64)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps, of which the median is taken")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (2 if arguments.tiny else 4)
    arguments.sequence = arguments.sequence or (64 if arguments.tiny else 4096)
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    rows = []
    for name in ROWS:
        rows.append(measure(name, mesh, arguments))
        if on_gpu:
            torch.cuda.empty_cache()
    for row in rows:
        row["ratio"] = row["tokens_per_s_per_gpu"] / rows[0]["tokens_per_s_per_gpu"]
        if not math.isclose(row["loss"], rows[0]["loss"], rel_tol=TOLERANCE):
            raise ArithmeticError(f"losses of the same tokens differ: {rows}")
    if dist.get_rank() == 0:
        if not arguments.tiny and not arguments.dry:
            size = {"batch": arguments.batch, "sequence": arguments.sequence, "gpus": mesh.size()}
            report.append("parallel_models", rows, **size, description=models.DESCRIPTIONS["qwen3"])
        report.print_table(f"Qwen3-MoE on {mesh.size()} GPUs, forward and backward", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
