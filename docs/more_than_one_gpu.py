"""Tables of docs/more-than-one-gpu.md: what the exchanges of expert parallelism move, and what was measured."""

from benchmarks import exchange_model
from benchmarks.shapes import SHAPES
from docs import pictures
from docs.measured import caption


def exchange_model_table() -> str:
    """What the exchanges move and store, by arithmetic."""
    shape = SHAPES["D"]
    lines = ["| ranks | plain | all_to_all | all_gather | all_gather, GiB |", "|---:|---:|---:|---:|---:|"]
    for num_ranks in exchange_model.RANKS:
        rows = exchange_model.rows_sent(shape.K, num_ranks).values()
        cells = [f"{exchange_model.kib_per_token(shape, count):.3g}" for count in rows]
        cells += [f"{exchange_model.gathered_gib(shape, num_ranks):.3g}"]
        lines.append(f"| {num_ranks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layers_measured() -> str:
    """Training steps of one expert layer on two GPUs."""
    record = pictures.records("expert_parallel")[-1]
    lines = ["| shape | exchange | ms | of one GPU | peak GiB |", "|---|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = row["shape"], row["exchange"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", caption(record)])


def models_measured() -> str:
    record = pictures.records("parallel_models")[-1]
    lines = ["| layout | tokens/s per GPU | of one GPU | peak GiB |", "|---|---:|---:|---:|"]
    for row in record["rows"]:
        cells = row["layout"], f"{row['tokens_per_s_per_gpu']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_gib']:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{record['settings']['description']}. {caption(record)}"])


def exchanges_measured() -> str:
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
    return "\n".join([*lines, "", caption(record)])
