"""Which experts of transformers are rewritten: a table over every architecture with @use_experts_implementation.

    python -m tests.models.survey [NAME ...] [--experts eager default] [--json FILE]

A tiny model of each architecture makes one training step under our backend, with eager experts and with the
implementation that transformers chooses by itself. Its twin, whose experts are one trivial registered function, shows
how many graphs the rest of the model needs. Equal: outputs and every gradient are those of eager.
"""

import argparse
import contextlib
import json
import logging
import warnings
from dataclasses import asdict, dataclass

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import scatter_moe
from tests.backend.harness import assert_same, compile_ours, fresh_dynamo, graphs, observe, rewritten
from tests.models.tiny import Architecture, architectures, first_output, token_ids

TWIN = "scatter_moe_survey_twin"
IMPLEMENTATIONS = {"eager": "eager", "default": None, "grouped_mm": "grouped_mm", "batched_mm": "batched_mm"}


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


def trivial_experts(self, hidden_states, top_k_index, top_k_weights):
    return hidden_states * top_k_weights.sum(-1, keepdim=True).to(hidden_states.dtype)


def moe_layers(architecture: Architecture, model: nn.Module) -> int:
    return sum(type(module).__name__ in architecture.experts for module in model.modules())


def graphs_of_twin(architecture: Architecture) -> int:
    fresh_dynamo()
    model = architecture.make(TWIN)
    observe(first_output(torch.compile(model, backend="counting_aot_eager"), model), model, token_ids())
    return len(graphs)


def survey(architecture: Architecture, experts: str) -> Row:
    """One row of the table; whatever goes wrong is its reason."""
    row = {"name": architecture.name, "experts": experts}
    try:
        implementation = IMPLEMENTATIONS[experts]
        eager, model = architecture.make("eager"), architecture.make(implementation)
        row["layers"] = moe_layers(architecture, model)
        row["twin_graphs"] = graphs_of_twin(architecture)
        fresh_dynamo()
        actual = observe(first_output(compile_ours(model), model), model, token_ids())
        row |= {"rewritten": rewritten(), "graphs": len(graphs)}
        expected = observe(first_output(eager, eager), eager, token_ids())
        actual.state = expected.state
        assert_same(actual, expected)
        row["equal"] = True
        if row["rewritten"] != row["layers"]:
            row["reason"] = first_rejection(model)
    except Exception as error:  # noqa: BLE001  the table is to name every failure
        row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return Row(**row)


def first_rejection(model: nn.Module) -> str:
    fresh_dynamo()
    with contextlib.redirect_stdout(None):
        report = scatter_moe.explain(model, input_ids=token_ids(), use_cache=False)
    return "; ".join(f"{r.rule}: {r.detail}" for r in report.rejections[:1]) or "no candidate"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--experts", nargs="+", choices=list(IMPLEMENTATIONS), default=["eager", "default"])
    parser.add_argument("--json", help="append the rows to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(TWIN, trivial_experts)
    chosen = [a for a in architectures() if not arguments.names or a.name in arguments.names]
    work = [(architecture, experts) for architecture in chosen for experts in arguments.experts]
    rows, progress = [], Console(stderr=True)
    for architecture, experts in track(work, console=progress):
        rows.append(survey(architecture, experts))
        progress.print(rows[-1], highlight=False)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
