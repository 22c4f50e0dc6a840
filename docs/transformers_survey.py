"""Keeps the rows of `tests.models.survey` and makes docs/transformers-survey.md of them.

python -m tests.models.survey --json FILE
python -m docs.transformers_survey FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "transformers_survey.jsonl"
PAGE = Path(__file__).parent / "transformers-survey.md"
INTRODUCTION = """\
# Every transformers model with experts

A tiny model of each architecture makes one training step with `backend="scatter_moe"`: with the loop over experts that
is in its source (`eager`), with what transformers runs unless told otherwise (`default`), or, where its experts have no
such interface, with the code that it has (`own`). Written by `python -m docs.transformers_survey FILE` from the rows of
`python -m tests.models.survey --json FILE`; `make releases ARGS="--json FILE"` makes those of older releases, each
installed from PyPI into an environment of its own.

**rewritten**: layers that ran as operators of this package, of those that ran: a text does not need all of some models.
**graphs**: of the whole step, and in brackets of its twin, which has a trivial function or a dense layer for experts.
**equal**: what it took to see that outputs and all gradients are those of eager: float32, to 2e-5 of each tensor's
largest value; also float64, to 1e-12, for tensors of which a float32 run of eager is itself further than that from the
float64 one. So some models amplify the rounding of their experts; eager runs several times, with the terms of the
experts' products added up in other orders. *float64 of torch.compile*: PyTorch's own compiled step, without this
package, differs from eager in float64, and results are compared with those. What is zero but for rounding, as the
gradient of a key's bias, must be that here, too."""

Row = dict[str, Any]


def text() -> str:
    """The page."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    releases = dict.fromkeys((row["transformers"], row["torch"]) for row in rows)
    sections = [
        section(
            f"transformers {name}, torch {torch}", [r for r in rows if (r["transformers"], r["torch"]) == (name, torch)]
        )
        for name, torch in releases
    ]
    if not sections:
        return f"{INTRODUCTION}\n\nNo survey has been recorded yet.\n"
    return "\n\n".join([INTRODUCTION, summary(rows), *sections]) + "\n"


def summary(rows: list[Row]) -> str:
    """How many architectures of each release are rewritten in full."""
    lines = ["| transformers | torch | experts | in full, with no graph more, equal | of |", "|---|---|---|---:|---:|"]
    for key in dict.fromkeys((row["transformers"], row["torch"], row["experts"]) for row in rows):
        chosen = [row for row in rows if (row["transformers"], row["torch"], row["experts"]) == key]
        lines.append(f"| {' | '.join(key)} | {sum(map(is_good, chosen))} | {len(chosen)} |")
    return "\n".join(lines)


def section(title: str, rows: list[Row]) -> str:
    """One release."""
    lines = [f"## {title}", ""]
    for experts in dict.fromkeys(row["experts"] for row in rows):
        chosen = [row for row in rows if row["experts"] == experts]
        good = sum(map(is_good, chosen))
        lines.append(f"- {experts}: {good} of {len(chosen)} architectures rewritten in full, with no graph more, equal")
    classes = {(row["name"], name) for row in rows for name in row["classes"] if row["experts"] == "eager"}
    bad = {(row["name"], name) for row in rows for name in row["classes"] if not is_good(row)}
    if classes:
        lines.append(f"- of the {len(classes)} decorated classes that ran, {len(classes - bad)} are so both ways")
    lines += [
        "",
        "| architecture | experts | rewritten | graphs | equal | what is left, and why |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)])


def is_good(row: Row) -> bool:
    return 0 < row["layers"] == row["rewritten"] and row["graphs"] <= row["twin_graphs"] and row["equal"]


def line(row: Row) -> str:
    cells = (
        row["name"],
        row["experts"],
        f"{row['rewritten']} of {row['layers']}",
        f"{row['graphs']} ({row['twin_graphs']})",
        row["compared_in"] if row["equal"] else "no",
        "" if is_good(row) else row["reason"].replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def keep(added: list[Row]) -> None:
    """Writes `added` to the rows that are kept, in the place of older ones of the same run."""
    old = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    rows = {tuple(row[key] for key in ("transformers", "torch", "name", "experts")): row for row in (*old, *added)}
    ROWS.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))


def main() -> None:
    for name in sys.argv[1:]:
        keep([json.loads(line) for line in Path(name).read_text().splitlines()])
    PAGE.write_text(text())


if __name__ == "__main__":
    main()
