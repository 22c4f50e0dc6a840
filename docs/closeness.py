"""Tables of docs/training.md: how close to transformers' eager experts, in one layer and in fine-tunes."""

import statistics
from collections.abc import Iterator

from docs import pictures


def rounding_table() -> str:
    """The last run of `benchmarks/rounding.py`."""
    record = pictures.records("rounding")[-1]
    lines = ["| tensor | experts | distance to float64 | distance to eager |", "|---|---|---:|---:|"]
    for row in record["rows"]:
        tensor = row["tensor"].replace("of ", "gradient of ", 1)
        lines.append(f"| {tensor} | {row['way']} | {row['error']:.1e} | {row['to eager']:.1e} |")
    return "\n".join([*lines, "", _caption(record)])


def fine_tune_table() -> str:
    """The last run of each command of `benchmarks/fine_tune.py`: gaps over seeds."""
    lines = [
        "| trained | dtype | steps | seeds | experts | largest gap | median gap "
        "| at most grouped_mm's | median of the rms |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    records = {record["command"]: record for record in pictures.records("fine_tune")}.values()
    lines += [row for record in records for row in _rows(record)]
    return "\n".join([*lines, "", *map(_caption, records)])


def _rows(record: dict) -> Iterator[str]:
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in record["rows"]:
        if row["way"] != "eager":
            groups.setdefault((row["trained"], row["way"]), []).append(row)
    for (trained, way), rows in groups.items():
        gaps = [row["gap"] for row in rows]
        theirs = [row["gap"] for row in groups[trained, "grouped_mm"]]
        within = sum(gap <= other for gap, other in zip(gaps, theirs, strict=True))
        rms = f"{statistics.median(row['rms'] for row in rows):.1e}" if "rms" in rows[0] else "-"
        way = "scatter_moe" if way == "experts implementation" else way
        seeds = "-" if way == "grouped_mm" else f"{within} of {len(gaps)} seeds"
        numbers = f"{max(gaps):.1e} | {statistics.median(gaps):.1e} | {seeds} | {rms}"
        dtype = "bf16 autocast" if record["settings"]["bf16"] else "fp32"
        yield f"| {trained} | {dtype} | {record['settings']['steps']} | {len(rows)} | {way} | {numbers} |"


def _caption(record: dict) -> str:
    environment = record["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("device", "torch", "transformers"))
    return f"{versions}, commit {environment['commit']}, `{record['command']}`.\n"
