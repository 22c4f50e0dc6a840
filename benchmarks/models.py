"""Training steps of whole models of transformers: its eager loop over experts, its grouped GEMM, and this backend.

    python -m benchmarks.models [--model qwen3 | mixtral] [--tiny] [--rows eager grouped_mm ...]

One step is forward and backward of a causal language model with labels. Each row runs in a process of its own, so that
neither memory nor compiled code is shared, and is given up after ``--timeout`` seconds. Results are appended to
``results/models.jsonl``, except those of ``--tiny``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._dynamo.utils import counters
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks import report, timing

console = Console()


@dataclass(frozen=True)
class Row:
    """A way of running the experts: transformers' implementation of them and torch.compile's backend, if any."""

    experts: str
    backend: str | None

    def __str__(self) -> str:
        return f"{self.experts}, {self.backend or 'not compiled'}"


ROWS = {
    "eager": Row("eager", None),
    "eager-inductor": Row("eager", "inductor"),
    "grouped_mm": Row("grouped_mm", None),
    "grouped_mm-inductor": Row("grouped_mm", "inductor"),
    "scatter_moe": Row("eager", "scatter_moe"),
}

DESCRIPTIONS = {
    "qwen3": "4 layers of Qwen3-30B-A3B's size (d 2048, f 768, 128 experts, 8 a token), vocabulary 32000",
    "mixtral": "2 layers of Mixtral-8x7B's size (d 4096, f 14336, 8 experts, 2 a token), vocabulary 32000",
}


def qwen3(tiny: bool, experts: str) -> nn.Module:
    size = {
        "num_hidden_layers": 2 if tiny else 4,
        "hidden_size": 64 if tiny else 2048,
        "moe_intermediate_size": 32 if tiny else 768,
        "num_experts": 8 if tiny else 128,
        "num_experts_per_tok": 2 if tiny else 8,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2 if tiny else 4,
        "head_dim": 16 if tiny else 128,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **_common_settings(experts)))


def mixtral(tiny: bool, experts: str) -> nn.Module:
    size = {
        "num_hidden_layers": 2,
        "hidden_size": 64 if tiny else 4096,
        "intermediate_size": 128 if tiny else 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4 if tiny else 32,
        "num_key_value_heads": 2 if tiny else 8,
    }
    return MixtralForCausalLM(MixtralConfig(**size, **_common_settings(experts)))


def _common_settings(experts: str) -> dict[str, Any]:
    return {"vocab_size": 32000, "use_cache": False, "experts_implementation": experts}


MODELS: dict[str, Callable[[bool, str], nn.Module]] = {"qwen3": qwen3, "mixtral": mixtral}


def build(model: str, tiny: bool, experts: str) -> nn.Module:
    """The model in bf16 (fp32 on the CPU), made on its device."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return MODELS[model](tiny, experts).train()
    finally:
        torch.set_default_dtype(default)


def measure(name: str, model_name: str, tiny: bool, batch: int, sequence: int, repeats: int) -> dict[str, Any]:
    """Times one row. Returns the table's cells."""
    row = ROWS[name]
    if row.backend == "scatter_moe":
        import scatter_moe  # noqa: F401  (the checkout may not be installed)
    model = build(model_name, tiny, row.experts)
    forward = torch.compile(model, backend=row.backend) if row.backend else model
    tokens = torch.randint(32000, (batch, sequence), device=next(model.parameters()).device)

    def step() -> None:
        forward(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    first_step_s = timing.seconds(step)
    step_ms = timing.median_ms(step, repeats, warmup=2)
    return {
        "experts": str(row),
        "tokens_per_second": 1e3 * batch * sequence / step_ms,
        "step_ms": step_ms,
        "peak_gib": timing.peak_gib(step),
        "first_step_s": first_step_s,
        "graphs": counters["stats"]["unique_graphs"] if row.backend else None,
        "rewritten": counters["scatter_moe"]["rewritten"] if row.backend == "scatter_moe" else None,
    }


def measure_in_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs `measure` in a process of its own. A row that fails or takes too long has the reason for its result."""
    command = [sys.executable, "-m", "benchmarks.models", *sys.argv[1:], "--measure", name]
    start = time.perf_counter()
    console.print(f"{name} ...", end=" ")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        console.print(f"more than {arguments.timeout} s")
        return {"experts": str(ROWS[name]), "error": f"more than {arguments.timeout} s"}
    console.print(f"{time.perf_counter() - start:.0f} s")
    if result.returncode != 0:
        console.print(result.stderr, markup=False)
        return {"experts": str(ROWS[name]), "error": (result.stderr.strip().splitlines() or ["?"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size: does the benchmark itself work?")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--batch", type=int, help="sequences (default 4, tiny 2)")
    parser.add_argument("--sequence", type=int, help="tokens a sequence (default 4096, tiny 64)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps, of which the median is taken")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one row")
    parser.add_argument("--measure", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (2 if arguments.tiny else 4)
    arguments.sequence = arguments.sequence or (64 if arguments.tiny else 4096)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    shape = {"model": arguments.model, "tiny": arguments.tiny, "batch": arguments.batch, "sequence": arguments.sequence}
    if arguments.measure:
        row = measure(arguments.measure, *shape.values(), repeats=arguments.repeats)
        print(json.dumps(row))
        return 0
    rows = [measure_in_process(name, arguments) for name in arguments.rows]
    report.print_table(
        f"{arguments.model}, {arguments.batch} x {arguments.sequence} tokens, forward and backward", rows
    )
    if not arguments.tiny:
        path = report.append("models", rows, **shape, description=DESCRIPTIONS[arguments.model])
        console.print(f"appended to {path}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
