"""The expert layers of Qwen3-30B (D) and Mixtral (B), divided among GPUs, against the same layer on each GPU alone.

    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel D B
    torchrun --nproc-per-node 2 -m benchmarks.expert_parallel --crossover D B

A row's ratio is the time of a training step of the undivided layer on one GPU over that of the divided one, the median
over rounds in which all alternate, each the mean of all GPUs; every GPU has T tokens in both. `plain` is an all-to-all
that sends a token once to each of its experts; `two chunks` (with --chunks) is ours on halves of the tokens, one's
exchange while the other is computed. Outputs and the gradient of x are compared with the undivided layer first.

--crossover: the two exchanges alone for several numbers of experts per token, which change the share of the ranks that
a token goes to.

T tokens of a rank, M rows that it receives, K experts per token, E experts, D model width, R ranks.
"""

import argparse
import dataclasses
import os
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks import report
from benchmarks.difference import relative_rms
from benchmarks.shapes import SHAPES, Inputs, Shape, inputs
from benchmarks.timing import peak_gib, seconds
from scatter_moe import ExpertMLP, ExpertParallel
from scatter_moe.distributed.all_to_all import Experts, exchange_all_to_all
from scatter_moe.distributed.exchange import share_of_ranks
from scatter_moe.distributed.partition import Partition

TOLERANCE = 1e-2  # relative RMS difference to the undivided layer, bfloat16
CROSSOVER = (1, 2, 3, 4, 6, 8)  # experts per token
CALLS = 4  # of each run in a round
_OPS = torch.ops.scatter_moe


def plain_all_to_all(
    experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, partition: Partition, group: dist.ProcessGroup
) -> Tensor:
    """One row for each token and expert, weighted where it came from."""
    top_k, name = ids_TK.shape[1], group.group_name
    order, offsets = _OPS.route(ids_TK, partition.num_experts)
    counts = offsets.diff(prepend=offsets.new_zeros(1)).view(partition.num_ranks, partition.per_rank).sum(1)
    received_counts = torch.empty_like(counts)
    dist.all_to_all_single(received_counts, counts, group=group)
    sent, received = torch.stack((counts, received_counts)).tolist()

    def transfer(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        started = torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), received, sent, name)
        return torch.ops._c10d_functional.wait_tensor(started)

    x_MD = transfer(_OPS.dispatch(x_TD, order, offsets, top_k), received, sent)
    ids_M1 = transfer(ids_TK.flatten()[order, None], received, sent)
    y_MD = experts(x_MD, partition.local(ids_M1), x_MD.new_ones(len(x_MD), 1))
    y = transfer(y_MD, sent, received)
    return _OPS.combine(y, weights_TK, order, offsets, top_k, True)


def two_chunks(
    experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, partition: Partition, group: dist.ProcessGroup
) -> Tensor:
    """Each half on a stream of its own, in backward too."""
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    results = []
    halves = zip(x_TD.chunk(2), ids_TK.chunk(2), weights_TK.chunk(2), strict=True)
    for stream, (x, ids, weights) in zip(streams, halves, strict=True):
        stream.wait_stream(streams[0])
        with torch.cuda.stream(stream):
            results.append(exchange_all_to_all(experts, x, ids, weights, partition, group))
    streams[0].wait_stream(streams[1])
    return torch.cat(results)


def divided(shape: Shape, layer: Inputs, mesh: DeviceMesh) -> ExpertMLP:
    experts = undivided(shape, layer)
    parallelize_module(experts, mesh, ExpertParallel(gradients="sum"))
    return experts


def undivided(shape: Shape, layer: Inputs) -> ExpertMLP:
    with torch.device("meta"):
        experts = ExpertMLP(shape.E, shape.D, shape.F, dtype=layer.x.dtype)
    experts.gate_up_proj = torch.nn.Parameter(layer.gate_up)
    experts.down_proj = torch.nn.Parameter(layer.down)
    return experts


def steps(shape: Shape, layer: Inputs, mesh: DeviceMesh, chunks: bool) -> dict[str, Callable[[], Tensor]]:
    """Training steps by name; each returns the layer's output and leaves gradients behind."""
    x, weights = layer.x.requires_grad_(), layer.topk_weights.requires_grad_()
    whole, parts = undivided(shape, layer), divided(shape, layer, mesh)
    partition = Partition(shape.E, mesh.size(), mesh.get_local_rank())
    assert parts.exchange is not None
    exchange = parts.exchange

    def step(run: Callable[[], Tensor], module: ExpertMLP) -> Callable[[], Tensor]:
        def once() -> Tensor:
            x.grad = weights.grad = None
            module.zero_grad()
            y = run()
            y.backward(layer.grad_out)
            return y.detach()

        return once

    def by_hand(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(parts.run_local, x, layer.topk_ids, weights, partition, mesh.get_group())

    def ours(kind: Any) -> Callable[[], Tensor]:
        return lambda: dataclasses.replace(exchange, kind=kind)(parts.run_local, x, layer.topk_ids, weights)

    runs = {
        "undivided": step(lambda: whole(x, layer.topk_ids, weights), whole),
        "plain": step(by_hand(plain_all_to_all), parts),
        "all_to_all": step(ours("all_to_all"), parts),
        "all_gather": step(ours("all_gather"), parts),
    }
    if chunks:
        runs["two chunks"] = step(by_hand(two_chunks), parts)
    return runs


def check(layer: Inputs, runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Relative RMS difference of y and of the gradient of x to the undivided layer; raises if one is too large."""

    def results(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        y = run()
        assert layer.x.grad is not None
        return y.float(), layer.x.grad.float()

    expected = results(runs["undivided"])
    errors = {
        name: max(relative_rms(a, b) for a, b in zip(results(run), expected, strict=True)) for name, run in runs.items()
    }
    if not all(error < TOLERANCE for error in errors.values()):
        raise ArithmeticError(f"differs from the undivided layer: {errors}")
    return errors


def layer_of(shape: Shape, mesh: DeviceMesh) -> Inputs:
    """The same weights and other tokens on every rank."""
    dtype = torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    torch.manual_seed(0)
    weights = inputs(shape._replace(T=1), dtype, mesh.device_type)
    torch.manual_seed(1 + dist.get_rank())
    tokens = inputs(shape._replace(F=1), dtype, mesh.device_type)
    return Inputs(tokens.x, tokens.topk_weights, tokens.topk_ids, weights.gate_up, weights.down, tokens.grad_out)


def alternate(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, the ranks' mean, of several calls that are queued as in training.

    A round's order is drawn, the same on every rank: a run that draws less power leaves the next one a higher clock.
    """
    times: dict[str, list[float]] = {key: [] for key in runs}
    draw = random.Random(0)
    for _ in range(rounds):
        for key in draw.sample(list(runs), len(runs)):
            run = runs[key]
            dist.barrier()
            times[key].append(1e3 / CALLS * seconds(lambda run=run: [run() for _ in range(CALLS)]))
    for values in times.values():
        total = torch.tensor(values, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(total)
        values[:] = (total / dist.get_world_size()).tolist()
    return times


def measure(name: str, mesh: DeviceMesh, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape = scaled(SHAPES[name], arguments.scale)
    layer = layer_of(shape, mesh)
    runs = steps(shape, layer, mesh, arguments.chunks)
    errors = check(layer, runs)
    times = alternate(runs, arguments.rounds)
    rows = []
    for key, run in runs.items():
        ratio = statistics.median(b / t for b, t in zip(times["undivided"], times[key], strict=True))
        milliseconds = statistics.median(times[key])
        rate = 1e3 * shape.T / milliseconds
        row = {"shape": name, "exchange": key, "ms": milliseconds, "tokens_per_s_per_gpu": rate, "ratio": ratio}
        rows.append(row | {"peak_gib": peak_gib(run), "error": errors[key]})
    return rows


def crossover(name: str, mesh: DeviceMesh, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both exchanges with experts that give x back: what they cost apart from the experts."""
    rows = []
    for top_k in CROSSOVER:
        shape = scaled(SHAPES[name], arguments.scale)._replace(K=top_k, F=1)
        if top_k > shape.E:
            continue
        layer = layer_of(shape, mesh)
        x, weights = layer.x.requires_grad_(), layer.topk_weights.requires_grad_()
        exchange = divided(shape, layer, mesh).exchange
        assert exchange is not None

        def run(kind: Any, layer=layer, exchange=exchange, x=x, weights=weights) -> Tensor:
            x.grad = weights.grad = None
            call = dataclasses.replace(exchange, kind=kind)
            y = call(lambda x, ids, weights: x + weights.sum(1, keepdim=True).to(x.dtype), x, layer.topk_ids, weights)
            y.backward(layer.grad_out)
            return y

        kinds = ("all_to_all", "all_gather")
        runs = {kind: (lambda kind=kind, run=run: run(kind)) for kind in kinds}
        alternate(runs, 2)
        times = {key: statistics.median(values) for key, values in alternate(runs, arguments.rounds).items()}
        row = {"shape": name, "K": top_k, "share_of_ranks": share_of_ranks(mesh.size(), top_k)}
        rows.append(row | {f"{kind}_ms": times[kind] for kind in kinds})
    return rows


def scaled(shape: Shape, scale: int) -> Shape:
    return shape._replace(T=shape.T // scale, D=shape.D // scale, F=shape.F // scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["D", "B"], choices=SHAPES)
    parser.add_argument("--crossover", action="store_true", help="the exchanges alone")
    parser.add_argument("--chunks", action="store_true", help="`two chunks` too; needs GPUs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=int, default=1, help="divides T, D and F: to try the command without GPUs")
    parser.add_argument("--dry", action="store_true", help="record nothing")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),))
    measured = crossover if arguments.crossover else measure
    rows = [row for name in arguments.shapes for row in measured(name, mesh, arguments)]
    if dist.get_rank() == 0:
        if arguments.scale == 1 and not arguments.dry:
            benchmark = "exchange_crossover" if arguments.crossover else "expert_parallel"
            nccl = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
            report.append(benchmark, rows, rounds=arguments.rounds, gpus=mesh.size(), nccl=nccl)
        title = (
            "the exchanges alone, forward and backward" if arguments.crossover else "one expert layer, training step"
        )
        report.print_table(title, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
