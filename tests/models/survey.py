"""Which experts of the installed transformers are rewritten: a table over every architecture that has some.

    python -m tests.models.survey [NAME ...] [--experts eager default] [--jobs N] [--json FILE]

A tiny model of each architecture makes one training step under our backend. From transformers 5.0 on, where the
implementation of experts can be chosen, it does so with eager experts and with what transformers chooses by itself;
older models, and the few newer ones that decorate nothing, have one row, "own". Its twin, which has no experts, shows
how many graphs the rest of the model needs. Equal: outputs and every gradient are those of eager, by the rule for
float32 or as close to the model's float64 run as eager itself is.

Each architecture has a process of its own.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from fx_passes.report import collecting
from tests.backend.harness import (
    Seen,
    assert_equal_value,
    assert_same,
    compile_ours,
    fresh_dynamo,
    graphs,
    observe,
    rewritten,
)
from tests.models.architectures import Architecture, architectures
from tests.models.tiny import first_output, token_ids
from tests.models.twin import make_twin
from tests.processes import Finished, run_all

OWN = "own"
IMPLEMENTATIONS = {"eager": "eager", "default": None, "grouped_mm": "grouped_mm", "batched_mm": "batched_mm"}
TIMES_OF_EAGER = 3  # how much further than eager from float64 a result may be that differs from eager


@dataclass(frozen=True)
class Row:
    """What became of one architecture with one implementation of its experts."""

    name: str
    experts: str
    layers: int = 0
    rewritten: int = 0
    graphs: int = 0
    twin_graphs: int = 0
    equal: bool = False
    reason: str = ""

    @property
    def good(self) -> bool:
        return 0 < self.layers == self.rewritten and self.graphs <= self.twin_graphs and self.equal


def survey(architecture: Architecture, experts: str) -> Row:
    """One row of the table; whatever goes wrong is its reason."""
    row = {"name": architecture.name, "experts": experts}
    try:
        model = architecture.make(IMPLEMENTATIONS.get(experts))
        row["layers"] = moe_layers(architecture, model)
        eager = step(architecture)
        row["twin_graphs"], inner = graphs_of_twin(architecture)
        fresh_dynamo()
        with collecting() as report:
            ours = observe(first_output(compile_ours(model, inner), model), model, token_ids())
        row |= {"rewritten": rewritten(), "graphs": len(graphs)}
        row["reason"] = "; ".join(f"{r.rule}: {r.detail}" for r in report.rejections[:1])
        assert_equal(ours, eager, lambda: step(architecture, torch.float64))
        row["equal"] = True
    except Exception as error:  # noqa: BLE001  the table is to name every failure
        row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return Row(**row)


def moe_layers(architecture: Architecture, model: nn.Module) -> int:
    """How many regions there are: one a block, two where rows are grouped outside of a block's two products."""
    blocks = [module for module in model.modules() if type(module).__name__ in architecture.blocks]
    return sum(2 if hasattr(block, "input_linear") else 1 for block in blocks)


def step(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Seen:
    """A training step with the model's own loops."""
    model = architecture.make("eager").to(dtype)
    return observe(first_output(model, model), model, token_ids(), grad_dtype=torch.float32)


def graphs_of_twin(architecture: Architecture) -> tuple[int, str]:
    """How many, and the inner compiler: AOTAutograd, unless PyTorch alone fails with it on the twin."""
    twin = make_twin(architecture, lambda model: first_output(model, model)(token_ids()))
    inner = "counting_aot_eager"
    try:
        count_graphs(twin, inner)
    except Exception:  # noqa: BLE001  whatever it is, it isn't ours
        inner = "counting_eager"
        count_graphs(twin, inner)
    return len(graphs), inner


def count_graphs(twin: nn.Module, inner: str) -> None:
    fresh_dynamo()
    observe(first_output(torch.compile(twin, backend=inner), twin), twin, token_ids())


def assert_equal(ours: Seen, eager: Seen, run_in_float64: Callable[[], Seen]) -> None:
    """By the rule for float32, or no more than TIMES_OF_EAGER as far from float64 as eager is."""
    ours.state = eager.state  # of the configuration and of transformers' own bookkeeping
    try:
        assert_same(ours, eager)
    except AssertionError as difference:
        assert_equal_value(ours.buffers, eager.buffers, "buffers")
        truth = run_in_float64()
        for name, exact in _named(truth).items():
            off, own = (_distance(_named(seen)[name], exact) for seen in (ours, eager))
            if off > TIMES_OF_EAGER * own:
                raise AssertionError(f"{name} is off by {off:.3g}, eager by {own:.3g}") from difference


def _named(seen: Seen) -> dict[str, torch.Tensor | None]:
    return {f"output {number}": output for number, output in enumerate(seen.outputs)} | seen.grads


def _distance(given: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """Of the element that is furthest off; an absent gradient is zeros."""
    if given is None or exact is None:
        return 0.0 if given is exact else float((exact if given is None else given).abs().max())
    return (given - exact).abs().max().item()


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
