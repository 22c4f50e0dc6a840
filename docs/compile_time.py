"""Tables of docs/performance.md: what the first training step of a compiled model costs."""

from docs import pictures

KINDS = {
    "stacked": "stacked weights",
    "modules": "ModuleList",
    "one buffer": "ModuleList, `stack_experts`",
    "floor": "floor",
    "routed dense": "one MLP behind the router",
    "dense": "one MLP",
}
RATIOS = {
    "of floor": "the floor",
    "of fewest experts": "fewest experts",
    "of routed dense": "one MLP behind the router",
    "of dense": "one MLP",
}


def tables() -> str:
    """All runs of `benchmarks/compile_time.py`."""
    return "\n\n".join(map(_table, pictures.records("compile_time")))


def _table(record: dict) -> str:
    settings, environment = record["settings"], record["environment"]
    by_inductor = settings["inner"] == "inductor"
    share = " in Inductor |" if by_inductor else ""
    lines = [
        f"| layers | E | experts | CPU seconds |{share} ratio to | guards, ms a call |",
        f"|---:|---:|---|---:|{'---:|' if by_inductor else ''}---|---:|",
    ]
    for row in record["rows"]:
        ratios = ", ".join(f"{name} {row[key]:.2f}" for key, name in RATIOS.items() if key in row) or "-"
        experts = "-" if row["kind"] == "dense" else row["experts"]
        share = f" {row['inductor_share']:.0%} |" if by_inductor else ""
        numbers = f"{row['cpu_seconds']:.2f} |{share} {ratios} | {row['guard_ms']:.2f}"
        lines.append(f"| {row['layers']} | {experts} | {KINDS[row['kind']]} | {numbers} |")
    run = f"Medians of {settings['rounds']} processes a cell" if settings["rounds"] > 1 else "One process a cell"
    how = f"{run}, inner compiler {settings['inner']}, load average {settings['load_average']:.0f} at the end"
    where = f"{environment['device']}, torch {environment['torch']}, commit {environment['commit']}"
    return "\n".join([*lines, "", f"{how}. {where}, `{record['command']}`."])
