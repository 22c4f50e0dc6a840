"""Bar charts of benchmarks/results as plain SVG: the same bytes from the same results, with nothing to install."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.rivals import RIVALS

IMPLEMENTATIONS = ("scatter_moe", *RIVALS)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
WIDTH, LABELS, VALUES, BAR, GAP, TOP = 760, 210, 110, 18, 8, 44
OURS, OTHERS = "#1565c0", "#90a4ae"
OUR_KINDS = ("stacked", "modules", "one buffer", "qwen3")
"""Kinds of `benchmarks/compile_models.py` that are rewritten; the rest is there to compare."""


def models(value: str, unit: str, title: str) -> str:
    """The last run of each model on a GPU: one bar a way of running its experts."""
    last = {r["settings"]["model"]: r for r in records("models") if r["environment"]["cuda"]}
    bars = [
        (f"{model}: {row['experts']}", row[value], "scatter_moe" in row["experts"])
        for model, record in last.items()
        for row in record["rows"]
        if row.get(value) is not None
    ]
    return chart(title, unit, bars, "{:,.0f}" if value == "tokens_per_second" else "{:.1f}")


def training_steps(value: str, title: str) -> str:
    """Balanced experts: the ratio to a dense product of as many FLOPs, which was measured in the same run."""
    bars = [
        (f"{shape}: {implementation}", row[value], implementation == "scatter_moe")
        for (shape, implementation), (_, row) in last_training_steps().items()
    ]
    return chart(title, "of dense", bars, "{:.2f}")


def last_training_steps() -> dict[tuple[str, str], tuple[dict, dict]]:
    """The last run of each shape and implementation that there still is, and its row; bf16, balanced experts."""
    found = {
        (row["shape"], row.get("implementation", "scatter_moe")): (record, row)
        for record in records("training_step")
        for row in record["rows"]
        if row["zipf"] == 0
        and row.get("dtype", "bfloat16") == "bfloat16"
        and row.get("implementation", "scatter_moe") in IMPLEMENTATIONS
    }
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "scatter_moe", item[0][1])))


def mixture_of_attention(value: str, title: str) -> str:
    """Each number of experts a token: the ratio to dense attention of equal width."""
    bars = [
        (f"K = {row['K']}: {row['implementation']}", row[value], row["implementation"].startswith("scatter_moe"))
        for row in last_mixtures_of_attention()
    ]
    return chart(title, "of dense", bars, "{:.2f}")


def last_mixtures_of_attention() -> list[dict]:
    """The last result of each implementation and number of experts a token; dense attention is what all relate to."""
    rows = {(row["K"], row["implementation"]): row for r in records("mixture_of_attention") for row in r["rows"]}
    return [rows[key] for key in sorted(rows, key=lambda key: key[0]) if key[1] != "dense"]


def exchanges() -> str:
    """The last run on several GPUs: training steps of divided layers, the ratio to the undivided one."""
    rows = [row for row in records("expert_parallel")[-1]["rows"] if row["exchange"] != "undivided"]
    names = [(f"{row['shape']}: {row['exchange']}", row["ratio"], row["exchange"].startswith("all_")) for row in rows]
    return chart("Training step, experts divided between two GPUs: speed of one GPU with all", "of it", names, "{:.2f}")


def parallel_models() -> str:
    """The last run of a whole model on several GPUs."""
    rows = records("parallel_models")[-1]["rows"]
    bars = [(row["layout"], row["tokens_per_s_per_gpu"], "EP" in row["layout"]) for row in rows]
    return chart("Qwen3-MoE on two GPUs, training step, for each GPU", "tokens/s", bars, "{:,.0f}")


def compile_time() -> str:
    """The first training step, in the last run without Inductor."""
    bars = [
        (f"{row['layers']} layers, E = {row['experts']}: {row['kind']}", row["cpu_seconds"], row["kind"] in OUR_KINDS)
        for row in last_compile_times()["aot_eager"]["rows"]
    ]
    return chart("First training step, compilation included", "CPU s", bars, "{:.2f}")


def last_compile_times() -> dict[str, dict]:
    """The last run with each inner compiler."""
    return {record["settings"]["inner"]: record for record in records("compile_time")}


def chart(title: str, unit: str, bars: Sequence[tuple[str, float, bool]], format_: str) -> str:
    """Horizontal bars (label, value, whether it is ours) from zero, each with its number."""
    largest = max(value for _, value, _ in bars)
    height = TOP + len(bars) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (label, value, ours) in enumerate(bars):
        y = TOP + index * (BAR + GAP)
        length = round((WIDTH - LABELS - VALUES) * value / largest, 1)
        number = f"{format_.format(value)} {unit}"
        lines += [
            f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABELS}" y="{y}" width="{length}" height="{BAR}" fill="{OURS if ours else OTHERS}"/>',
            f'<text x="{round(LABELS + length + 6, 1)}" y="{y + 14}">{escape(number)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def records(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
