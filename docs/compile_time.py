"""Tables of docs/performance.md: what the first training step of a compiled model costs."""

from docs import pictures

KINDS = {
    "stacked": "stacked weights",
    "modules": "ModuleList",
    "one buffer": "ModuleList, `stack_experts`",
    "floor": "floor",
    "routed dense": "one MLP behind the router",
    "dense": "one MLP",
    "qwen3": "Qwen3-MoE",
    "qwen3 dense": "Qwen3-MoE, MLPs alone",
}
DENSE = ("dense", "qwen3 dense")
RATIOS = {
    "of floor": "the floor",
    "of fewest experts": "fewest experts",
    "of routed dense": "one MLP behind the router",
    "of dense": "one MLP",
    "of qwen3 dense": "MLPs alone",
}


def tables() -> str:
    """The last run of `benchmarks/compile_time.py` with each inner compiler."""
    return "\n\n".join(map(_table, pictures.last_compile_times().values()))


def _table(record: dict) -> str:
    settings, environment = record["settings"], record["environment"]
    by_inductor = settings["inner"] == "inductor"
    share = " in Inductor |" if by_inductor else ""
    lines = [
        f"| layers | E | experts | CPU s | least | elapsed s |{share} ratio to: CPU, elapsed | guards, ms a call |",
        f"|---:|---:|---|---:|---:|---:|{'---:|' if by_inductor else ''}---|---:|",
    ]
    for row in record["rows"]:
        named = {name: key for key, name in RATIOS.items() if key in row}
        ratios = "; ".join(f"{name} {row[key]:.2f}, {row[f'{key}, elapsed']:.2f}" for name, key in named.items()) or "-"
        experts = "-" if row["kind"] in DENSE else row["experts"]
        share = f" {row['inductor_share']:.0%} |" if by_inductor else ""
        seconds = " | ".join(f"{row[key]:.2f}" for key in ("cpu_seconds", "least_cpu_seconds", "seconds"))
        numbers = f"{seconds} |{share} {ratios} | {row['guard_ms']:.2f}"
        lines.append(f"| {row['layers']} | {experts} | {KINDS[row['kind']]} | {numbers} |")
    run = f"Medians of {settings['rounds']} processes a cell" if settings["rounds"] > 1 else "One process a cell"
    loads = settings["load_averages"]
    how = f"{run}, inner compiler {settings['inner']}, load average {min(loads):.1f} to {max(loads):.1f}"
    where = f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}"
    return "\n".join([*lines, "", f"{how}. {where}, `{record['command']}`."])
