"""Tables and progress on a terminal. Needs rich, which the extra `cli` has."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from scatter_moe.cli.errors import UsageError
from scatter_moe.cli.examine import Outcome

try:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise UsageError("tables need rich: pip install 'scatter-moe[cli]', or use --json") from missing


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; gives the function that says what is being done."""
    with Console(stderr=True).status("") as status:
        yield lambda step: status.update(escape(step))


def print_info(found: dict[str, Any]) -> None:
    console = Console()
    console.print(_table("versions", ("package", "version"), found["versions"].items()))
    columns = ("device", "name", "memory, GiB", "operators run on", "tuning")
    console.print(_table("devices", columns, [device.values() for device in found["devices"]]))
    experts = found["transformers"]
    if experts is None:
        console.print("transformers is not installed")
        return
    rows = [
        ("experts implementations", ", ".join(["eager", *experts["implementations"]])),
        ("architectures that take one", f"{len(experts['interface'])}: {', '.join(experts['interface'])}"),
        ("for experts in FP8", ", ".join(["eager", *experts["fp8_implementations"]]) + "; not scatter_moe"),
        ("always on their own path", f"{len(experts['own_path'])}: {', '.join(experts['own_path'])}"),
    ]
    console.print(_table("experts in transformers", ("", ""), rows))


def print_outcome(outcome: Outcome) -> None:
    console = Console()
    target, explanation = outcome.target, outcome.explanation
    facts = {"layers": target.layers, "experts_implementation": target.experts, "device": target.device}
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    console.print(f"[bold]{escape(target.name)}[/bold]{'  ' + escape(known) if known else ''}")
    console.print(explanation.summary)
    if explanation.regions:
        columns = ("module", "form", "E", "K", "activation", "op", "source")
        rows = [
            (r.module_path or "-", r.form, r.num_experts, r.top_k, r.activation, r.op, os.path.basename(r.source))
            for r in explanation.regions
        ]
        console.print(_table("rewritten", columns, rows))
    if explanation.rejections:
        rows = [(r.module_path or "-", r.rule, r.detail, f"{r.source}\n{r.code}") for r in explanation.rejections]
        console.print(_table("left as they are", ("module", "rule", "what was seen", "source"), rows))
    for deviation in dict.fromkeys(d for region in explanation.regions for d in region.deviations):
        console.print(f"deviation: {escape(deviation)}")
    for note in explanation.notes:
        console.print(f"note: {escape(note)}")
    for label, text in (("stopped", outcome.stopped), ("hint", outcome.hint)):
        if text:
            console.print(f"[bold]{label}:[/bold] {escape(text)}")


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else escape(str(cell)) for cell in row))
    return table
