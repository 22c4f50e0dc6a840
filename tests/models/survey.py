"""Which experts of the installed transformers are rewritten: a table over every architecture that has some.

    python -m tests.models.survey [NAME ...] [--experts eager default] [--jobs N] [--json FILE]

A tiny model of each architecture makes one training step under our backend. From transformers 5.0 on, where the
implementation of experts can be chosen, it does so with eager experts and with what transformers chooses by itself;
older models, and the few newer ones that decorate nothing, have one row, "own". Its twin, which has no experts, shows
how many graphs the rest of the model needs.

Equal: outputs and every gradient are those of eager by the rules of `tests.models.equality`.

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
from tests.backend.harness import Seen, compile_ours, fresh_dynamo, graphs, observe
from tests.models.architectures import Architecture, architectures
from tests.models.equality import OTHER_ORDERS, MoreSteps, compare, reorder_sums
from tests.models.tiny import first_output, token_ids
from tests.models.twin import make_twin
from tests.processes import Finished, run_all

OWN = "own"
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
    of ours: one compiled graph may serve several layers. `compared_in` names what it took to see that it is equal.
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
        row["compared_in"] = compare(ours, eager, more_steps(architecture, experts, inner))
        row["equal"] = True
    except Exception as error:  # noqa: BLE001  the table is to name every failure
        left.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return Row(**row, reason="; ".join(left))


def layers_in(block: nn.Module) -> int:
    """One, and another of its experts without parameters."""
    experts = getattr(block, "experts", None)
    has_identities = isinstance(experts, nn.ModuleList) and any(isinstance(expert, nn.Identity) for expert in experts)
    return 1 + bool(has_identities or getattr(experts, "zero_expert_num", 0))


def step_of_eager(
    architecture: Architecture, dtype: torch.dtype = torch.float32, order: int | None = None
) -> tuple[Seen, list[nn.Module]]:
    """A training step with the model's own loops, and the blocks that took part in it: a text does not need all.

    `order` is the seed of another order of sums in the blocks' products.
    """
    model = architecture.make("eager").to(dtype)
    blocks = [module for module in model.modules() if type(module).__name__ in architecture.blocks]
    if order is not None:
        reorder_sums(blocks, order)
    seen = training_step(model, model)
    return seen, [block for block in blocks if any(weight.grad is not None for weight in block.parameters())]


def step_of_ours(architecture: Architecture, experts: str, inner: str, dtype: torch.dtype = torch.float32) -> Seen:
    """A training step under our backend."""
    model = architecture.make(IMPLEMENTATIONS.get(experts)).to(dtype)
    fresh_dynamo()
    layers_run.clear()
    return training_step(compile_ours(model, inner), model)


def step_of_stock(architecture: Architecture, inner: str, dtype: torch.dtype) -> Seen:
    """A training step under torch.compile alone, of the model's own loops."""
    model = architecture.make("eager").to(dtype)
    fresh_dynamo()
    return training_step(torch.compile(model, backend=inner), model)


def training_step(call: Callable[..., Any], model: nn.Module) -> Seen:
    with by_default(next(model.parameters()).dtype):
        return observe(first_output(call, model), model, token_ids(), grad_dtype=torch.float32)


def more_steps(architecture: Architecture, experts: str, inner: str) -> MoreSteps:
    return MoreSteps(
        reordered=lambda: (step_of_eager(architecture, order=seed)[0] for seed in range(OTHER_ORDERS)),
        eager=lambda: step_of_eager(architecture, torch.float64)[0],
        ours=lambda: step_of_ours(architecture, experts, inner, torch.float64),
        stock=lambda: step_of_stock(architecture, inner, torch.float64),
    )


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """Masks that a model makes without a dtype hold the least number of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
