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
from dataclasses import dataclass
from pathlib import Path

import torch

import registrations
from docs import closeness, compile_time, gallery, measured, more_than_one_gpu, parts, pictures, transformers_survey
from fx_passes.forms import FORMS
from scatter_ops import reference

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin: {} (docs/generate.py) -->", "<!-- end: {} -->"


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
    return Page(path, between_markers(path.read_text(), "models", measured.models_table()))


def limits_page() -> Page:
    """The README's section as a page of its own; its links are those of docs/."""
    section = (ROOT / "README.md").read_text().split("## Limits and deviations")[1].split("\n## ")[0].strip()
    return Page(ROOT / "docs" / "limits.md", "# Limits and deviations\n\n" + section.replace("](docs/", "](") + "\n")


def performance_page() -> Page:
    path = ROOT / "docs" / "performance.md"
    models = "\n".join(map(measured.model_caption, measured.last_runs_of_models()))
    text = between_markers(path.read_text(), "environments", models)
    text = between_markers(text, "shapes", measured.layers_table())
    text = between_markers(text, "dtypes", measured.dtypes_table())
    text = between_markers(text, "compile_time", compile_time.tables())
    text = between_markers(text, "layouts", measured.layouts_table())
    text = between_markers(text, "decode", measured.decode_table())
    return Page(path, between_markers(text, "mixture_of_attention", measured.attention_table()))


def training_page() -> Page:
    path = ROOT / "docs" / "training.md"
    text = between_markers(path.read_text(), "rounding", closeness.rounding_table())
    return Page(path, between_markers(text, "fine_tune", closeness.fine_tune_table()))


def exchange_page() -> Page:
    path = ROOT / "docs" / "more-than-one-gpu.md"
    text = between_markers(path.read_text(), "exchange_model", more_than_one_gpu.exchange_model_table())
    text = between_markers(text, "layers_measured", more_than_one_gpu.layers_measured())
    text = between_markers(text, "models_measured", more_than_one_gpu.models_measured())
    return Page(path, between_markers(text, "alone_measured", more_than_one_gpu.exchanges_measured()))


def kernels_page() -> Page:
    path = ROOT / "docs" / "kernels.md"
    return Page(path, between_markers(path.read_text(), "counters", measured.counters_table()))


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
