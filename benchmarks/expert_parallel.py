"""The expert layers of Qwen3-30B (D) and Mixtral (B), divided among GPUs, against the same layer on each GPU alone.

    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel D B

A row's ratio is the time of a training step of the undivided layer on this GPU over that of the divided one, the median
over rounds in which all alternate; every GPU has T tokens in both. `plain` is an all-to-all that sends a token once to
each of its experts. Outputs and the gradient of x are compared with the undivided layer first.

T tokens of a rank, M rows that it receives, K experts per token, E experts, D model width, R ranks.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks import report
from benchmarks.shapes import SHAPES, Inputs, Shape, inputs
from benchmarks.timing import peak_gib, seconds
from scatter_moe import ExpertMLP, ExpertParallel
from scatter_moe.distributed import collectives
from scatter_moe.distributed.all_to_all import Experts
from scatter_moe.distributed.partition import Partition

TOLERANCE = 1e-2  # relative RMS difference to the undivided layer, bfloat16
_OPS = torch.ops.scatter_moe


def plain_all_to_all(
    experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, partition: Partition, group: dist.ProcessGroup
) -> Tensor:
    """One row for each token and expert, weighted where it came from."""
    top_k = ids_TK.shape[1]
    order, offsets = _OPS.route(ids_TK, partition.num_experts)
    counts = offsets.diff(prepend=offsets.new_zeros(1)).view(partition.num_ranks, partition.per_rank)
    ones = [1] * partition.num_ranks
    (received_counts,) = collectives.all_to_all((counts,), ones, ones, group)
    sent, received = torch.stack((counts.sum(1), received_counts.sum(1))).tolist()
    rows, ids = _OPS.dispatch(x_TD, order, offsets, top_k), ids_TK.flatten()[order, None]
    x_MD, ids_M1 = collectives.all_to_all((rows, ids), sent, received, group)
    y_MD = experts(x_MD, partition.local(ids_M1), x_MD.new_ones(len(x_MD), 1))
    (y,) = collectives.all_to_all((y_MD,), received, sent, group)
    return _OPS.combine(y, weights_TK, order, offsets, top_k, True)


def divided(shape: Shape, layer: Inputs, mesh: DeviceMesh, exchange: str) -> ExpertMLP:
    experts = undivided(shape, layer)
    style = ExpertParallel(exchange, gradients="sum")  # pyright: ignore[reportArgumentType]
    parallelize_module(experts, mesh, style)
    return experts


def undivided(shape: Shape, layer: Inputs) -> ExpertMLP:
    with torch.device("meta"):
        experts = ExpertMLP(shape.E, shape.D, shape.F, dtype=layer.x.dtype)
    experts.gate_up_proj = torch.nn.Parameter(layer.gate_up)
    experts.down_proj = torch.nn.Parameter(layer.down)
    return experts


def steps(shape: Shape, layer: Inputs, mesh: DeviceMesh) -> dict[str, Callable[[], Tensor]]:
    """Training steps by name; each returns the layer's output and leaves gradients behind."""
    x, weights = layer.x.requires_grad_(), layer.topk_weights.requires_grad_()
    whole = undivided(shape, layer)
    parts = divided(shape, layer, mesh, "all_to_all")
    gathered = divided(shape, layer, mesh, "all_gather")
    partition = Partition(shape.E, mesh.size(), mesh.get_local_rank())

    def step(run: Callable[[], Tensor], module: ExpertMLP) -> Callable[[], Tensor]:
        def once() -> Tensor:
            x.grad = weights.grad = None
            module.zero_grad()
            y = run()
            y.backward(layer.grad_out)
            return y.detach()

        return once

    def plain() -> Tensor:
        return plain_all_to_all(parts.run_local, x, layer.topk_ids, weights, partition, mesh.get_group())

    return {
        "undivided": step(lambda: whole(x, layer.topk_ids, weights), whole),
        "plain": step(plain, parts),
        "all_to_all": step(lambda: parts(x, layer.topk_ids, weights), parts),
        "all_gather": step(lambda: gathered(x, layer.topk_ids, weights), gathered),
    }


def check(layer: Inputs, runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Relative RMS difference of y and of the gradient of x to the undivided layer; raises if one is too large."""

    def results(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        y = run()
        assert layer.x.grad is not None
        return y.float(), layer.x.grad.float()

    expected = results(runs["undivided"])
    errors = {
        name: max(((a - b).norm() / b.norm()).item() for a, b in zip(results(run), expected, strict=True))
        for name, run in runs.items()
    }
    if not all(error < TOLERANCE for error in errors.values()):
        raise ArithmeticError(f"differs from the undivided layer: {errors}")
    return errors


def measure(name: str, rounds: int, mesh: DeviceMesh, scale: int) -> list[dict[str, Any]]:
    shape = SHAPES[name]
    shape = shape._replace(T=shape.T // scale, D=shape.D // scale, F=shape.F // scale)
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    torch.manual_seed(0)  # the same weights on every rank
    weights = inputs(shape._replace(T=1), dtype, mesh.device_type)
    torch.manual_seed(1 + dist.get_rank())
    tokens = inputs(shape._replace(F=1), dtype, mesh.device_type)
    layer = Inputs(tokens.x, tokens.topk_weights, tokens.topk_ids, weights.gate_up, weights.down, tokens.grad_out)
    runs = steps(shape, layer, mesh)
    errors = check(layer, runs)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            dist.barrier()
            times[key].append(1e3 * seconds(run))
    rows = []
    for key, run in runs.items():
        ratio = statistics.median(b / t for b, t in zip(times["undivided"], times[key], strict=True))
        milliseconds = statistics.median(times[key])
        rate = 1e3 * shape.T / milliseconds
        row = {"shape": name, "exchange": key, "ms": milliseconds, "tokens_per_s_per_gpu": rate, "ratio": ratio}
        rows.append(row | {"peak_gib": peak_gib(run), "error": errors[key]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["D", "B"], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=int, default=1, help="divides T, D and F: to try the command without GPUs")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    rows = [row for name in arguments.shapes for row in measure(name, arguments.rounds, mesh, arguments.scale)]
    if dist.get_rank() == 0:
        if arguments.scale == 1:
            report.append("expert_parallel", rows, rounds=arguments.rounds, gpus=mesh.size())
        report.print_table("one expert layer, training step", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
