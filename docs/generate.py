"""Writes the parts of the documentation that repeat what the code or the benchmarks say.

    python -m docs.generate            rewrites them
    python -m docs.generate --check    fails where one is out of date

docs/forms.md       the docstring of each form
docs/gallery.md     the naive code and the rewritten graph of each golden
docs/parts.md       signatures and docstrings of the public Python API
docs/limits.md      the README's section on limits and deviations
docs/pictures/      bar charts of benchmarks/results
docs/performance.md between its markers: where and what the pictures' numbers are from
docs/kernels.md     between its markers: the counters of the profiled runs
docs/transformers-survey.md    the rows of docs/transformers_survey.jsonl
docs/ops.md         between its markers: each operator's schema and what its reference says
README.md           between its markers: the last run of each model in benchmarks/results/models.jsonl
"""

import inspect
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import registrations
from benchmarks import exchange_model
from benchmarks.shapes import SHAPES
from docs import closeness, compile_time, gallery, parts, pictures, transformers_survey
from fx_passes.forms import FORMS
from scatter_ops import reference

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin: {} (docs/generate.py) -->", "<!-- end: {} -->"
COUNTERS_COLUMNS = {
    "phase": "kernel",
    "shape": "shape",
    "ms": "ms",
    "sm_ghz": "clock, GHz",
    "tensor_pipe_percent": "tensor cores busy, %",
    "dram_percent": "memory, %",
    "l2_percent": "L2 cache, %",
    "issue_slots_percent": "issue slots used, %",
    "samples_in_main_loop_percent": "time in the main loop, %",
}
ATTENTION_COLUMNS = {
    "K": "K",
    "E": "E",
    "heads of an expert": "heads of an expert",
    "implementation": "implementation",
    "forward_ms": "forward, ms",
    "step_ms": "step, ms",
    "forward_ratio": "forward, of dense",
    "step_ratio": "step, of dense",
    "peak_gib": "peak of a step, GiB",
}
LAYOUT_COLUMNS = {
    "shape": "shape",
    "layout": "parameters",
    "forward_ms": "forward, ms",
    "step_ms": "step, ms",
    "forward_ratio": "forward, of stacked",
    "step_ratio": "step, of stacked",
    "step_host_ms": "host of a step, ms",
}
MODELS_COLUMNS = {
    "model": "model",
    "experts": "experts and compiler",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak memory, GiB",
    "first_step_s": "first step, s",
    "graphs": "graphs",
}


@dataclass(frozen=True)
class Page:
    """A file and what it should contain."""

    path: Path
    text: str

    @property
    def up_to_date(self) -> bool:
        return self.path.exists() and self.path.read_text() == self.text


def pages() -> list[Page]:
    written_whole = [
        Page(ROOT / "docs" / "gallery.md", gallery.text()),
        Page(ROOT / "docs" / "parts.md", parts.text()),
        Page(transformers_survey.PAGE, transformers_survey.text()),
    ]
    return [
        forms_page(),
        ops_page(),
        readme(),
        limits_page(),
        performance_page(),
        training_page(),
        exchange_page(),
        kernels_page(),
        *written_whole,
        *charts(),
    ]


def forms_page() -> Page:
    """One section a form, in the order in which they are tried."""
    sections = [
        "# Naive forms",
        "The ways of writing a Mixture-of-Experts layer that are recognised, one file of `fx_passes/forms/` each. The\n"
        "rules that a match must also satisfy before it is rewritten are in [invariants.md](invariants.md).",
    ]
    for form in FORMS:
        sections += [f"## {form.__name__.split('.')[-1]}", docstring(form)]
    return Page(ROOT / "docs" / "forms.md", "\n\n".join(sections) + "\n")


def ops_page() -> Page:
    """The hand-written page with one section an op between its markers."""
    path = ROOT / "docs" / "ops.md"
    sections = []
    for name in sorted(registrations.__all__):
        if hasattr(torch.ops.scatter_moe, name):
            schema = str(getattr(torch.ops.scatter_moe, name).default._schema)
            documented = getattr(reference, name, None) or getattr(registrations, name)
            sections.append(f"### `{name}`\n\n```\n{wrap(schema)}\n```\n\n{docstring(documented)}")
    return Page(path, between_markers(path.read_text(), "ops", "\n\n".join(sections)))


def readme() -> Page:
    path = ROOT / "README.md"
    return Page(path, between_markers(path.read_text(), "models", models_table()))


def limits_page() -> Page:
    """The README's section as a page of its own; its links are those of docs/."""
    section = (ROOT / "README.md").read_text().split("## Limits and deviations")[1].split("\n## ")[0].strip()
    return Page(ROOT / "docs" / "limits.md", "# Limits and deviations\n\n" + section.replace("](docs/", "](") + "\n")


def performance_page() -> Page:
    path = ROOT / "docs" / "performance.md"
    shapes = ["| shape | T | D | F | E | K |", "|---|---:|---:|---:|---:|---:|"]
    shapes += [f"| {name} | " + " | ".join(f"{size:,}" for size in shape) + " |" for name, shape in SHAPES.items()]
    steps = pictures.last_training_steps().values()
    text = between_markers(path.read_text(), "environments", "\n".join(map(_models_caption, last_runs_of_models())))
    runs = "\n".join(dict.fromkeys(_caption(record) for record in steps))
    text = between_markers(text, "shapes", "\n".join(shapes) + "\n\n" + runs)
    text = between_markers(text, "compile_time", compile_time.tables())
    layouts = pictures.records("layouts")[-1]
    table = measured_table(LAYOUT_COLUMNS, layouts["rows"])
    text = between_markers(text, "layouts", f"{table}\n\n{_caption(layouts)}")
    attention = measured_table(ATTENTION_COLUMNS, pictures.last_mixtures_of_attention())
    runs = "\n".join(map(_caption, pictures.records("mixture_of_attention")))
    return Page(path, between_markers(text, "mixture_of_attention", f"{attention}\n\n{runs}"))


def training_page() -> Page:
    path = ROOT / "docs" / "training.md"
    text = between_markers(path.read_text(), "rounding", closeness.rounding_table())
    return Page(path, between_markers(text, "fine_tune", closeness.fine_tune_table()))


def measured_table(columns: dict[str, str], rows: Sequence[dict]) -> str:
    """Rows of a benchmark; columns are the keys that are shown with their headings."""
    texts = [key for key in columns if isinstance(rows[0][key], str)]
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines += ["|" + "|".join("---" if key in texts else "---:" for key in columns) + "|"]
    for row in rows:
        cells = [row[key] for key in columns]
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def exchange_page() -> Page:
    """What the exchanges of expert parallelism move and store, by arithmetic."""
    path = ROOT / "docs" / "more-than-one-gpu.md"
    shape = SHAPES["D"]
    lines = ["| ranks | plain | all_to_all | all_gather | all_gather, GiB |", "|---:|---:|---:|---:|---:|"]
    for num_ranks in exchange_model.RANKS:
        rows = exchange_model.rows_sent(shape.K, num_ranks).values()
        cells = [f"{exchange_model.kib_per_token(shape, count):.3g}" for count in rows]
        cells += [f"{exchange_model.gathered_gib(shape, num_ranks):.3g}"]
        lines.append(f"| {num_ranks} | " + " | ".join(cells) + " |")
    text = between_markers(path.read_text(), "exchange_model", "\n".join(lines))
    for name, lines in {
        "layers": layers_measured(),
        "models": models_measured(),
        "alone": exchanges_measured(),
    }.items():
        text = between_markers(text, f"{name}_measured", "\n".join(lines))
    return Page(path, text)


def layers_measured() -> list[str]:
    """Training steps of one expert layer on two GPUs."""
    record = pictures.records("expert_parallel")[-1]
    lines = ["| shape | exchange | ms | of one GPU | peak GiB |", "|---|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = row["shape"], row["exchange"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", _caption(record)]


def models_measured() -> list[str]:
    record = pictures.records("parallel_models")[-1]
    lines = ["| layout | tokens/s per GPU | of one GPU | peak GiB |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = row["layout"], f"{row['tokens_per_s_per_gpu']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", f"{record['settings']['description']}. {_caption(record)}"]


def exchanges_measured() -> list[str]:
    """What the model says goes to the other GPU, and the bandwidth at which it went."""
    record = pictures.records("exchange_crossover")[-1]
    num_ranks = record["settings"]["gpus"]
    lines = ["| shape | K | exchange | rows sent a token (model) | ms | GB/s |", "|---|---:|---|---:|---:|---:|"]
    for row in record["rows"]:
        shape = SHAPES[row["shape"]]
        rows = exchange_model.rows_sent(row["K"], num_ranks)
        for name in ("all_to_all", "all_gather"):
            milliseconds = row[f"{name}_ms"]
            bandwidth = exchange_model.gigabytes_per_step(shape, rows[name]) / (1e-3 * milliseconds)
            cells = row["shape"], str(row["K"]), name, f"{rows[name]:.3g}", f"{milliseconds:.2f}", f"{bandwidth:.0f}"
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", _caption(record)]


def kernels_page() -> Page:
    """The hand-written page with the counters of the profiled runs."""
    path = ROOT / "docs" / "kernels.md"
    runs = pictures.records("counters")
    lines = [
        "| " + " | ".join(COUNTERS_COLUMNS.values()) + " |",
        "|---|---" + "|---:" * (len(COUNTERS_COLUMNS) - 2) + "|",
    ]
    rows = [row for record in runs for row in record["rows"]]
    lines += ["| " + " | ".join(str(row[key]) for key in COUNTERS_COLUMNS) + " |" for row in rows]
    notes = [record["settings"]["note"] for record in runs]
    captions = [f"{_caption(run)} {note[0].upper() + note[1:]}." for run, note in zip(runs, notes, strict=True)]
    content = "\n".join(lines) + "\n\n" + "\n\n".join(captions)
    return Page(path, between_markers(path.read_text(), "counters", content))


def charts() -> list[Page]:
    svg = {
        "models_tokens": pictures.models("tokens_per_second", "tokens/s", "Tokens a second"),
        "models_memory": pictures.models("peak_gib", "GiB", "Peak memory"),
        "models_first_step": pictures.models("first_step_s", "s", "First step, compilation included"),
        "layer_forward": pictures.training_steps("forward_ratio", "Forward, ratio to one dense product"),
        "attention_forward": pictures.mixture_of_attention("forward_ratio", "Forward, ratio to dense attention"),
        "attention_step": pictures.mixture_of_attention("step_ratio", "Training step, ratio to dense attention"),
        "layer_step": pictures.training_steps("step_ratio", "Training step, ratio to dense products"),
        "compile_time": pictures.compile_time(),
        "exchanges": pictures.exchanges(),
        "parallel_models": pictures.parallel_models(),
    }
    return [Page(ROOT / "docs" / "pictures" / f"{name}.svg", text) for name, text in svg.items()]


def last_runs_of_models() -> list[dict]:
    """The last recorded run of each model on a GPU."""
    records = [record for record in pictures.records("models") if record["environment"]["cuda"]]
    return list({record["settings"]["model"]: record for record in records}.values())


def models_table() -> str:
    """The last recorded run of each model on a GPU, as a Markdown table; a plain sentence before there is one."""
    last = last_runs_of_models()
    if not last:
        return "No run on a GPU has been recorded yet: `python -m benchmarks.models` makes one."
    lines = ["| " + " | ".join(MODELS_COLUMNS.values()) + " |", "|---|---" + "|---:" * (len(MODELS_COLUMNS) - 2) + "|"]
    for record in last:
        lines += [_models_row(record["settings"]["model"], row) for row in record["rows"]]
    return "\n".join(lines) + "\n\n" + "\n".join(_models_caption(record) for record in last)


def docstring(documented: object) -> str:
    text = inspect.getdoc(documented)
    if text is None:
        raise ValueError(f"{documented!r} has no docstring")
    return text


def wrap(schema: str) -> str:
    """A schema in lines of readable length."""
    return textwrap.fill(schema, width=110, subsequent_indent="    ", break_long_words=False)


def between_markers(text: str, name: str, content: str) -> str:
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one line {begin!r} and one line {end!r}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def _models_row(model: str, row: dict) -> str:
    cells = [model, *(_cell(row.get(key)) for key in list(MODELS_COLUMNS)[1:])]
    return "| " + " | ".join(cells) + " |"


def _models_caption(record: dict) -> str:
    return f"{record['settings']['model']}: {record['settings']['description']}. {_caption(record)}"


def _caption(record: dict) -> str:
    environment = record["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "transformers"))
    nccl = [f"{name}={value}" for name, value in record["settings"].get("nccl", {}).items()]
    command = " ".join([*nccl, record["command"]])
    return f"{environment['device']}, {versions}, commit {environment['commit']}, `{command}`.\n"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    stale = [page for page in pages() if not page.up_to_date]
    names = ", ".join(str(page.path.relative_to(ROOT)) for page in stale)
    if "--check" in sys.argv[1:]:
        if stale:
            print(f"out of date: {names}; run `make docs`", file=sys.stderr)
        return int(bool(stale))
    for page in stale:
        page.path.write_text(page.text)
    print(f"written: {names or 'nothing, all up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
