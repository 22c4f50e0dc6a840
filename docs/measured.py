"""Tables of benchmarks/results: whole models, layers, kernels. Below each: where and how it was measured."""

from collections.abc import Sequence

from benchmarks.shapes import SHAPES
from docs import pictures

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
LAYER_COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "forward_ms": "forward, ms",
    "forward_ratio": "forward, of dense",
    "training_forward_ratio": "training forward, of dense",
    "step_ms": "step, ms",
    "step_ratio": "step, of dense",
    "held": "held, MiB",
    "peak": "peak, MiB",
}
DTYPE_COLUMNS = {
    "shape": "shape",
    "dtype": "dtype",
    "forward_ms": "forward, ms",
    "forward_ratio": "forward, of dense",
    "step_ms": "step, ms",
    "step_ratio": "step, of dense",
    "peak": "peak, MiB",
    "least_peak": "least peak, MiB",
}
SHAPES_IN_DTYPES = ("C", "D", "odd")
LAYOUT_COLUMNS = {
    "shape": "shape",
    "layout": "parameters",
    "forward_ms": "forward, ms",
    "step_ms": "step, ms",
    "forward_ratio": "forward, of stacked",
    "step_ratio": "step, of stacked",
    "step_host_ms": "host of a step, ms",
}
DECODE_COLUMNS = {
    "model": "experts of",
    "T": "tokens",
    "experts": "experts that are read",
    "implementation": "implementation",
    "us": "us",
    "GB/s": "GB/s",
}
MODELS_COLUMNS = {
    "model": "model",
    "experts": "experts and compiler",
    "tokens_per_second": "tokens/s",
    "peak_gib": "peak memory, GiB",
    "first_step_s": "first step, s",
    "graphs": "graphs",
}


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
    return "\n".join(lines) + "\n\n" + "\n".join(model_caption(record) for record in last)


def layers_table() -> str:
    """The shapes of `benchmarks/shapes.py`, and the last training steps that were timed on them."""
    lines = ["| shape | T | D | F | E | K |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | " + " | ".join(f"{size:,}" for size in shape) + " |" for name, shape in SHAPES.items()]
    steps = pictures.last_training_steps()
    rows = [row | {"held": f"{row['held']:,.0f}", "peak": f"{row['peak']:,.0f}"} for _, row in steps.values()]
    runs = "\n".join(dict.fromkeys(caption(record) for record, _ in steps.values()))
    return "\n\n".join(("\n".join(lines), measured_table(LAYER_COLUMNS, rows), runs))


def dtypes_table() -> str:
    """The last training step of some shapes in each dtype; TF32 is float32 with PyTorch's precision "high"."""
    found = {
        (row["shape"], row["dtype"]): (record, row)
        for record in pictures.records("training_step")
        for row in record["rows"]
        if row["zipf"] == 0 and row["shape"] in SHAPES_IN_DTYPES and "dtype" in row
    }
    last = [found[key] for key in sorted(found)]
    rows = [row | {name: f"{row[name]:,.0f}" for name in ("peak", "least_peak")} for _, row in last]
    return (
        measured_table(DTYPE_COLUMNS, rows) + "\n\n" + "\n".join(dict.fromkeys(caption(record) for record, _ in last))
    )


def layouts_table() -> str:
    """The last run of `benchmarks/layouts.py`."""
    record = pictures.records("layouts")[-1]
    return f"{measured_table(LAYOUT_COLUMNS, record['rows'])}\n\n{caption(record)}"


def decode_table() -> str:
    """The last result of each experts, number of tokens and implementation of `benchmarks/decode.py`."""
    found = {
        (row["model"], row["T"], row["implementation"]): (record, row)
        for record in pictures.records("decode")
        for row in record["rows"]
        if row["implementation"] in pictures.IMPLEMENTATIONS
    }
    table = measured_table(DECODE_COLUMNS, [row for _, row in sorted(found.values(), key=_place_of_decode)])
    copies = {caption(record): record["settings"]["copy_gb_per_s"] for record, _ in found.values()}
    runs = [f"A copy, read and written, reaches {copy:,.0f} GB/s in this run: {run}" for run, copy in copies.items()]
    return table + "\n\n" + "\n".join(runs)


def attention_table() -> str:
    """The last result of each cell of `benchmarks/mixture_of_attention.py`."""
    table = measured_table(ATTENTION_COLUMNS, pictures.last_mixtures_of_attention())
    return "\n\n".join((table, "\n".join(map(caption, pictures.records("mixture_of_attention")))))


def counters_table() -> str:
    """All profiled runs of kernels."""
    runs = pictures.records("counters")
    lines = [
        "| " + " | ".join(COUNTERS_COLUMNS.values()) + " |",
        "|---|---" + "|---:" * (len(COUNTERS_COLUMNS) - 2) + "|",
    ]
    rows = [row for record in runs for row in record["rows"]]
    lines += ["| " + " | ".join(str(row.get(key, "-")) for key in COUNTERS_COLUMNS) + " |" for row in rows]
    notes = [record["settings"]["note"] for record in runs]
    captions = [f"{caption(run)} {note[0].upper() + note[1:]}." for run, note in zip(runs, notes, strict=True)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(captions)


def measured_table(columns: dict[str, str], rows: Sequence[dict]) -> str:
    """Rows of a benchmark; columns are the keys that are shown with their headings."""
    texts = [key for key in columns if isinstance(rows[0][key], str)]
    lines = ["| " + " | ".join(columns.values()) + " |"]
    lines += ["|" + "|".join("---" if key in texts else "---:" for key in columns) + "|"]
    for row in rows:
        cells = [row[key] for key in columns]
        lines.append("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def _place_of_decode(found: tuple[dict, dict]) -> tuple:
    row = found[1]
    return row["model"], row["T"], row["implementation"] != "scatter_moe", row["implementation"]


def _models_row(model: str, row: dict) -> str:
    cells = [model, *(_cell(row.get(key)) for key in list(MODELS_COLUMNS)[1:])]
    return "| " + " | ".join(cells) + " |"


def model_caption(record: dict) -> str:
    return f"{record['settings']['model']}: {record['settings']['description']}. {caption(record)}"


def caption(record: dict) -> str:
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
