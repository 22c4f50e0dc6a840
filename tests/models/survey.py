"""Which experts of the installed transformers are rewritten: a table over every architecture that has some.

    python -m tests.models.survey [NAME ...] [--experts eager default] [--jobs N] [--json FILE]

A tiny model of each architecture makes one training step under our backend. From transformers 5.0 on, where the
implementation of experts can be chosen, it does so with eager experts and with what transformers chooses by itself;
older models, and the few newer ones that decorate nothing, have one row, "own". Its twin, which has no experts, shows
how many graphs the rest of the model needs.

Equal: outputs and every gradient are those of eager by the rule for float32. A tensor of which eager's own float32 run
is further from its float64 run than the rule allows is compared in float64 instead, where nothing is amplified.

Each architecture has a process of its own. `python -m docs.transformers_survey FILE` makes a page of the rows.
"""

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo import lookup_backend, register_backend

from fx_passes.report import collecting
from tests.backend.harness import (
    Seen,
    assert_equal_value,
    compile_ours,
    fresh_dynamo,
    graphs,
    observe,
)
from tests.models.architectures import Architecture, architectures
from tests.models.tiny import first_output, token_ids
from tests.models.twin import make_twin
from tests.numerics import assert_exact
from tests.processes import Finished, run_all

OWN = "own"
NOISE = 1e-6  # float64's rounding is 2e-9 of float32's
AOT, NO_AOT = "counting_runs_of_aot_eager", "counting_runs_of_eager"
IMPLEMENTATIONS = {"eager": "eager", "default": None, "grouped_mm": "grouped_mm", "batched_mm": "batched_mm"}


layers_run: list[float] = []


def counting_runs(inner: str) -> Callable[..., Any]:
    """The harness's `inner` backend, which also notes, whenever a graph runs, how many rewritten layers it holds."""

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        layers = rewritten_layers(gm.graph)
        compiled = lookup_backend(inner)(gm, example_inputs)

        def run(*args: Any) -> Any:
            layers_run.append(layers)
            return compiled(*args)

        return run

    return backend


def rewritten_layers(graph: torch.fx.Graph) -> float:
    """A layer has one `mlp` or `combine`; two products that were rewritten apart have but a `route` each."""
    ops = torch.ops.scatter_moe
    found = Counter(node.target for node in graph.nodes)
    whole = found[ops.mlp.default] + found[ops.combine.default]
    return whole + (found[ops.route.default] - whole) / 2


register_backend(counting_runs("counting_aot_eager"), name=AOT)
register_backend(counting_runs("counting_eager"), name=NO_AOT)


@dataclass(frozen=True)
class Row:
    """What became of one architecture with one implementation of its experts.

    `classes` are those of the blocks that ran, `layers` is their number, `rewritten` how many of them ran as operators
    of ours: one compiled graph may serve several layers. `compared_in` names the dtypes that
    it took: "float32", or "float32, float64".
    """

    name: str
    experts: str
    classes: tuple[str, ...] = ()
    layers: int = 0
    rewritten: int = 0
    graphs: int = 0
    twin_graphs: int = 0
    equal: bool = False
    compared_in: str = ""
    reason: str = ""
    transformers: str = transformers.__version__
    torch: str = torch.__version__

    @property
    def good(self) -> bool:
        return 0 < self.layers == self.rewritten and self.graphs <= self.twin_graphs and self.equal


def survey(architecture: Architecture, experts: str) -> Row:
    """One row of the table; whatever goes wrong is its reason."""
    row: dict[str, Any] = {"name": architecture.name, "experts": experts}
    left: list[str] = ["eager itself fails"]
    try:
        eager, blocks = step_of_eager(architecture)
        row["classes"] = tuple(sorted({type(block).__name__ for block in blocks}))
        row["layers"] = sum(map(layers_in, blocks))
        left.clear()
        row["twin_graphs"], inner = graphs_of_twin(architecture)
        with collecting() as report:
            ours = step_of_ours(architecture, experts, inner)
        row |= {"rewritten": int(sum(layers_run)), "graphs": len(graphs)}
        left += [f"{r.rule}: {r.detail}" for r in report.rejections[:1]]
        row["compared_in"] = compare(ours, eager, lambda: in_float64(architecture, experts, inner))
        row["equal"] = True
    except Exception as error:  # noqa: BLE001  the table is to name every failure
        left.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return Row(**row, reason="; ".join(left))


def layers_in(block: nn.Module) -> int:
    """One, and another of its experts without parameters."""
    experts = getattr(block, "experts", None)
    has_identities = isinstance(experts, nn.ModuleList) and any(isinstance(expert, nn.Identity) for expert in experts)
    return 1 + bool(has_identities or getattr(experts, "zero_expert_num", 0))


def step_of_eager(architecture: Architecture, dtype: torch.dtype = torch.float32) -> tuple[Seen, list[nn.Module]]:
    """A training step with the model's own loops, and the blocks that took part in it: a text does not need all."""
    model = architecture.make("eager").to(dtype)
    with by_default(dtype):
        seen = observe(first_output(model, model), model, token_ids(), grad_dtype=torch.float32)
    blocks = [module for module in model.modules() if type(module).__name__ in architecture.blocks]
    return seen, [block for block in blocks if any(weight.grad is not None for weight in block.parameters())]


def step_of_ours(architecture: Architecture, experts: str, inner: str, dtype: torch.dtype = torch.float32) -> Seen:
    """A training step under our backend."""
    model = architecture.make(IMPLEMENTATIONS.get(experts)).to(dtype)
    fresh_dynamo()
    layers_run.clear()
    with by_default(dtype):
        return observe(first_output(compile_ours(model, inner), model), model, token_ids(), grad_dtype=torch.float32)


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """Masks that a model makes without a dtype hold the least number of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64(architecture: Architecture, experts: str, inner: str) -> tuple[Seen, Seen]:
    ours = step_of_ours(architecture, experts, inner, torch.float64)
    return ours, step_of_eager(architecture, torch.float64)[0]


def graphs_of_twin(architecture: Architecture) -> tuple[int, str]:
    """How many, and the inner compiler: AOTAutograd, unless PyTorch alone fails with it on the twin."""
    twin = make_twin(architecture, lambda model: first_output(model, model)(token_ids()))
    try:
        count_graphs(twin, AOT)
    except Exception:  # noqa: BLE001  whatever it is, it isn't ours
        count_graphs(twin, NO_AOT)
        return len(graphs), NO_AOT
    return len(graphs), AOT


def count_graphs(twin: nn.Module, inner: str) -> None:
    fresh_dynamo()
    observe(first_output(torch.compile(twin, backend=inner), twin), twin, token_ids())


def compare(ours: Seen, eager: Seen, in_float64: Callable[[], tuple[Seen, Seen]]) -> str:
    """The dtypes in which `ours` equals `eager`; raises AssertionError where it doesn't.

    `in_float64` makes both once more.
    """
    assert_equal_value(ours.buffers, eager.buffers, "buffers")
    assert [like(output) for output in ours.outputs] == [like(output) for output in eager.outputs]
    differences = differing(ours, eager)
    if not differences:
        return "float32"
    ours_exact, exact = in_float64()
    amplified = differing(eager, exact)
    noise = {name for name in _named(exact) if all(is_noise(eager, run, name) for run in (exact, ours_exact))}
    in_doubt = {name: difference for name, difference in differences.items() if name not in amplified}
    for name, difference in (in_doubt | differing(ours_exact, exact)).items():
        if name not in noise:
            raise difference
    return "float32, float64"


def is_noise(in_float32: Seen, in_float64: Seen, name: str) -> bool:
    """Whether a tensor is zero but for rounding (the gradient of a key's bias): it shrinks with the precision."""
    narrow, wide = (_named(run)[name] for run in (in_float32, in_float64))
    return narrow is not None and wide is not None and bool(wide.abs().max() <= NOISE * narrow.abs().max())


def differing(given: Seen, expected: Seen) -> dict[str, AssertionError]:
    """The outputs and gradients that are not equal by the rule for the wider of both dtypes."""
    found, results = {}, _named(given)
    for name, tensor in _named(expected).items():
        try:
            assert_exact({name: results[name]}, {name: tensor}, torch.float32 if tensor is None else tensor.dtype)
        except AssertionError as difference:
            found[name] = difference
    return found


def like(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _named(seen: Seen) -> dict[str, torch.Tensor | None]:
    return {f"output {number}": output for number, output in enumerate(seen.outputs)} | seen.grads


def show(rows: list[Row]) -> None:
    table = Table(title=f"transformers {transformers.__version__}, torch {torch.__version__}")
    for column in ("architecture", "experts", "layers", "rewritten", "graphs", "twin", "equal", "reason"):
        table.add_column(column)
    for row in rows:
        numbers = (row.layers, row.rewritten, row.graphs, row.twin_graphs)
        table.add_row(row.name, row.experts, *map(str, numbers), "yes" if row.equal else "no", row.reason[:90])
    console = Console(width=180)
    console.print(table)
    for experts in dict.fromkeys(row.experts for row in rows):
        chosen = [row for row in rows if row.experts == experts]
        console.print(f"{experts}: {sum(row.good for row in chosen)} of {len(chosen)} rewritten in full")


def rows_of(architecture: Architecture, implementations: list[str]) -> list[str]:
    return implementations if architecture.dispatched else [OWN]


def survey_here(architecture: Architecture, implementations: list[str]) -> None:
    """In this process, one JSON line a row."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for experts in rows_of(architecture, implementations):
        print(json.dumps(asdict(survey(architecture, experts))), flush=True)


def rows_from(finished: Finished, architecture: Architecture, implementations: list[str]) -> list[Row]:
    rows = {line["experts"]: Row(**line) for line in finished.lines}
    return [
        rows.get(experts) or Row(architecture.name, experts, reason=finished.fault)
        for experts in rows_of(architecture, implementations)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--experts", nargs="+", choices=list(IMPLEMENTATIONS), default=["eager", "default"])
    parser.add_argument("--jobs", type=int, default=1, help="how many architectures at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for an architecture")
    parser.add_argument("--json", help="append the rows to this file")
    parser.add_argument("--here", action="store_true", help="in this process, with rows as JSON on stdout")
    arguments = parser.parse_args()
    chosen = [a for a in architectures() if not arguments.names or a.name in arguments.names]
    if arguments.here:
        for architecture in chosen:
            survey_here(architecture, arguments.experts)
        return
    commands = [["-m", "tests.models.survey", "--here", a.name, "--experts", *arguments.experts] for a in chosen]
    rows: list[Row] = []
    for count, finished in enumerate(run_all(commands, jobs=arguments.jobs, timeout=arguments.timeout), 1):
        new = rows_from(finished, chosen[finished.number], arguments.experts)
        rows += new
        told = ", ".join(f"{row.experts} {row.rewritten}/{row.layers}" for row in new)
        print(f"[{count}/{len(commands)}] {chosen[finished.number].name}: {told}", file=sys.stderr, flush=True)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in new)
    show(sorted(rows, key=lambda row: (row.name, row.experts)))


if __name__ == "__main__":
    main()
