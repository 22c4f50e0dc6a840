"""What the first training step of a compiled model costs, by the number of experts: python -m benchmarks.compile_time.

    stacked       a hit loop over stacked weights
    modules       a loop over a ModuleList of experts
    one buffer    the same after scatter_moe.stack_experts, whose time counts, too
    floor         the same ModuleList, router and residuals; each layer hands all its parameters to one stub operator
    routed dense  the same model with one MLP in place of the experts, times the sum of the router's weights
    dense         the same model with one MLP in place of router and experts

The inner compiler is aot_eager unless told otherwise: then the time is that of Dynamo, of the rewrite and of
AOTAutograd, and no C++ compiler hides it. With --inner inductor Inductor's share of the elapsed time is measured, too.
Each measurement is a process of its own, with PyTorch's compile caches off; kinds and sizes take turns. Seconds are CPU
seconds of the process and of the compilers that it starts: other people's load changes them less than elapsed time.
Guard time is that of one call whose guards hold, in CPU time of its thread.

T tokens, K experts per token, E experts, D model width, F expert width.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo import utils

import scatter_moe
from benchmarks import report

T, D, FF, K = 64, 32, 32, 2
EXPERTS = (8, 32, 128, 256)
LAYERS, MANY_LAYERS = 4, 24
GUARD_CALLS = 50


class Expert(nn.Module):
    """w2(silu(w1 x) * w3 x)"""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, FF, bias=False)
        self.w2 = nn.Linear(FF, D, bias=False)
        self.w3 = nn.Linear(D, FF, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """A softmax top-k router; subclasses have the experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate = nn.Linear(D, num_experts, bias=False)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """topk_weights_TK and topk_ids_TK."""
        weights, ids = self.gate(x_TD).softmax(-1).topk(K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class Stacked(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * FF, D) / D**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, D, FF) / FF**0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        out = torch.zeros_like(x_TD)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slots, tokens = torch.where(mask[e[0]])
            gate, up = F.linear(x_TD[tokens], self.gate_up[e[0]]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, self.down[e[0]])
            out.index_add_(0, tokens, rows * weights[tokens, slots, None])
        return out


class Modules(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.experts = nn.ModuleList(Expert() for _ in range(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        out = torch.zeros_like(x_TD)
        mask = F.one_hot(ids, self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slots, tokens = torch.where(mask[e])
            out.index_add_(0, tokens, self.experts[e](x_TD[tokens]) * weights[tokens, slots, None])
        return out


class Floor(Modules):
    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.route(x_TD)
        parameters = [parameter for e in self.experts for parameter in weights_of(e)]
        return torch.ops.scatter_moe_benchmark.stub(x_TD, weights, ids, parameters)


def weights_of(expert: Any) -> tuple[Tensor, Tensor, Tensor]:
    return expert.w1.weight, expert.w3.weight, expert.w2.weight


class Dense(Expert):
    def __init__(self, num_experts: int) -> None:
        super().__init__()


class RoutedDense(Router):
    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.mlp = Expert()

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, _ = self.route(x_TD)
        return self.mlp(x_TD) * weights.sum(-1, keepdim=True)


KINDS = {
    "stacked": Stacked,
    "modules": Modules,
    "one buffer": Modules,
    "floor": Floor,
    "dense": Dense,
    "routed dense": RoutedDense,
}
REWRITTEN = ("stacked", "modules", "one buffer")


class Model(nn.Module):
    def __init__(self, kind: str, num_experts: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KINDS[kind](num_experts) for _ in range(num_layers))

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD)
        return x_TD


def define_stub() -> None:
    """An operator of all parameters of a layer, with a backward operator: all that is trained gets a gradient."""
    library = torch.library.Library("scatter_moe_benchmark", "DEF")
    library.define("stub(Tensor x, Tensor weights, Tensor ids, Tensor[] parameters) -> Tensor")
    library.define("stub_backward(Tensor grad, Tensor weights, Tensor[] parameters) -> (Tensor, Tensor, Tensor)")

    def forward(x: Tensor, weights: Tensor, ids: Tensor, parameters: list[Tensor]) -> Tensor:
        return x * weights.sum()

    def backward(grad: Tensor, weights: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return grad.clone(), weights.clone(), grad.new_zeros(len(parameters), *parameters[0].shape)

    for name, function in (("stub", forward), ("stub_backward", backward)):
        library.impl(name, function, "CPU")
        torch.library.register_fake(f"scatter_moe_benchmark::{name}", function, lib=library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], *inputs[3])

    def derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, *parameters = ctx.saved_tensors
        grad_x, grad_weights, grads = torch.ops.scatter_moe_benchmark.stub_backward(grad, weights, parameters)
        return grad_x, grad_weights, None, list(grads.unbind(0))

    torch.library.register_autograd("scatter_moe_benchmark::stub", derivative, setup_context=setup_context, lib=library)
    globals()["_library"] = library  # an operator lives as long as its library


def measure(kind: str, num_experts: int, num_layers: int, inner: str) -> dict[str, float]:
    """In a fresh process: seconds of the first training step, Inductor's share, and milliseconds of the guards."""
    torch.manual_seed(0)
    define_stub()
    model, x = Model(kind, num_experts, num_layers), torch.randn(T, D)
    compiled = torch.compile(model, backend="scatter_moe", options={"inner_backend": inner}, fullgraph=True)
    compiled_first = torch.compile(nn.Linear(2, 2), backend=inner, dynamic=True)
    compiled_first(torch.ones(3, 2)).sum().backward()  # PyTorch's own imports
    start, start_cpu, start_inductor = time.perf_counter(), cpu_seconds(), inductor_seconds()
    if kind == "one buffer":
        scatter_moe.stack_experts(model)
    compiled(x).sum().backward()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu
    expected = num_layers if kind in REWRITTEN else 0
    rewritten = utils.counters["scatter_moe"]["rewritten"]
    if rewritten != expected:
        raise RuntimeError(f"{rewritten} layers were rewritten, not {expected}")
    share = (inductor_seconds() - start_inductor) / seconds
    return {"cpu_seconds": cpu, "seconds": seconds, "inductor_share": share, "guard_ms": guard_ms(model, x)}


def inductor_seconds() -> float:
    """Elapsed time in Inductor so far."""
    return utils.calculate_time_spent().get("inductor_compile", 0.0)


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def guard_ms(model: Model, x_TD: Tensor) -> float:
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Model.forward.__code__)
    values, times = {"self": model, "x_TD": x_TD}, []
    for _ in range(GUARD_CALLS):
        start = time.thread_time()
        holds = entry.guard_manager.check(values)
        times.append(1e3 * (time.thread_time() - start))
        if not holds:
            raise RuntimeError("the guards do not hold on the inputs that they were made for")
    return statistics.median(times)


def in_a_process(inner: str, kind: str, num_experts: int, num_layers: int) -> dict[str, float]:
    arguments = ["--inner", inner, "--one", kind, str(num_experts), str(num_layers)]
    settings = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{kind} with {num_experts} experts failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(cells: Sequence[tuple[str, int, int]], measured: dict[Any, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians over the processes of a cell, and the ratio that its kind is judged by."""
    medians = {
        cell: {key: statistics.median(run[key] for run in measured[cell]) for key in measured[cell][0]}
        for cell in cells
    }
    rows = []
    for kind, num_experts, num_layers in cells:
        row = {"kind": kind, "experts": num_experts, "layers": num_layers, **medians[kind, num_experts, num_layers]}
        for name, base in bases(kind, num_experts, num_layers, cells).items():
            row[name] = row["cpu_seconds"] / medians[base]["cpu_seconds"]
        rows.append(row)
    return rows


def bases(
    kind: str, num_experts: int, num_layers: int, cells: Sequence[tuple[str, int, int]]
) -> dict[str, tuple[str, int, int]]:
    found = {}
    if kind in ("modules", "one buffer"):
        found["of floor"] = ("floor", num_experts, num_layers)
    if kind in ("stacked", "one buffer"):
        found["of fewest experts"] = (kind, min(e for k, e, n in cells if (k, n) == (kind, num_layers)), num_layers)
    if kind == "stacked":
        found["of routed dense"] = ("routed dense", num_experts, num_layers)
        found["of dense"] = ("dense", 1, num_layers)
    return {name: cell for name, cell in found.items() if cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["stacked", "modules", "one buffer", "floor"], choices=KINDS)
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--many-layers", type=int, default=MANY_LAYERS, help="of stacked and its dense twins; 0 for none"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after them no further round begins")
    parser.add_argument("--inner", default="aot_eager", help="the inner compiler")
    parser.add_argument("--one", nargs=3, help="kind, experts and layers: measured in this process")
    arguments = parser.parse_args()
    if arguments.one:
        kind, num_experts, num_layers = arguments.one
        print(json.dumps(measure(kind, int(num_experts), int(num_layers), arguments.inner)))
        return
    cells = [(kind, e, arguments.layers) for e in arguments.experts for kind in arguments.kinds]
    if arguments.many_layers:
        few = min(arguments.experts)
        cells += [
            (kind, e, arguments.many_layers) for kind, e in (("stacked", few), ("routed dense", few), ("dense", 1))
        ]
    measured: dict[Any, list[dict[str, float]]] = {cell: [] for cell in cells}
    start = time.monotonic()
    while len(measured[cells[0]]) < arguments.rounds and time.monotonic() - start < 60 * arguments.minutes:
        for cell in track(cells, f"round {len(measured[cells[0]]) + 1}"):
            measured[cell].append(in_a_process(arguments.inner, *cell))
    rows = summary(cells, measured)
    sizes = {"T": T, "D": D, "F": FF, "K": K}
    settings = {"rounds": len(measured[cells[0]]), "inner": arguments.inner, "sizes": sizes}
    report.append("compile_time", rows, load_average=os.getloadavg()[0], **settings)
    report.print_table("first training step of a compiled model", rows)


if __name__ == "__main__":
    main()
