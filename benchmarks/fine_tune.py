"""Loss curves of a fine-tune by transformers' Trainer: python -m benchmarks.fine_tune [--steps 200] [--bf16].

A small Qwen3-MoE with random weights learns to go on with arithmetic progressions, all of it or adapters alone (peft's
LoRA on the experts' stacked weights and on the queries). The same seed, data and weights in four ways:

    eager                     transformers' loop over experts, the curve that the others are compared with
    grouped_mm                transformers' own grouped products
    backend                   eager experts, `model.compile(backend="scatter_moe")` before Trainer
    experts implementation    experts_implementation="scatter_moe", not compiled

`gap` is the largest difference of the loss to eager's at any step, `rms` its root mean square over the steps. Rounding
differs between the four, a choice of experts may flip, and the steps amplify both: the gap of transformers' own two
ways says how much is normal. It is drawn anew with each seed, so several are run, and the medians over seeds are
printed too. `benchmarks/rounding.py` says what happens in one layer, where nothing is amplified.
"""

import argparse
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

import scatter_moe  # noqa: F401  (registers the backend and the experts implementation)
from benchmarks import report

VOCABULARY, LENGTH, BATCH = 64, 32, 8


@dataclass(frozen=True)
class Way:
    experts: str
    backend: str | None = None


WAYS = {
    "eager": Way("eager"),
    "grouped_mm": Way("grouped_mm"),
    "backend": Way("eager", "scatter_moe"),
    "experts implementation": Way("scatter_moe"),
}


class Progressions(Dataset):
    """Sequences a, a + b, a + 2 b, ... modulo the vocabulary."""

    def __init__(self, number: int) -> None:
        start, step = torch.randint(VOCABULARY, (2, number, 1), generator=torch.Generator().manual_seed(0))
        self.tokens = (start + step * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def model(experts: str, lora: bool, seed: int) -> nn.Module:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    settings = {"norm_topk_prob": True, "use_cache": False, "experts_implementation": experts}
    config = Qwen3MoeConfig(**sizes, **settings)
    torch.manual_seed(seed)
    full = Qwen3MoeForCausalLM(config)
    if not lora:
        return full
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        return get_peft_model(full, LoraConfig(r=8, target_modules=["q_proj"], target_parameters=targets))


def losses(way: Way, lora: bool, steps: int, bf16: bool, seed: int) -> list[float]:
    """One fine-tune: the loss of each step."""
    torch.compiler.reset()
    trained = model(way.experts, lora, seed)
    if way.backend is not None:
        trained.compile(backend=way.backend)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3 if lora else 3e-4,
            bf16=bf16,
            logging_steps=1,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(trained, arguments, train_dataset=Progressions(BATCH * steps))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def measure(ways: dict[str, Way], lora: bool, steps: int, bf16: bool, seed: int) -> list[dict[str, Any]]:
    """One row a way: first and last loss, and the gap to the first way."""
    curves = {name: losses(way, lora, steps, bf16, seed) for name, way in ways.items()}
    first = next(iter(curves.values()))
    return [
        {"trained": "LoRA" if lora else "all", "seed": seed, "way": name}
        | {"first loss": curve[0], "last loss": curve[-1]}
        | {"gap": max(map(_distance, curve, first)), "rms": _rms(list(map(_distance, curve, first)))}
        for name, curve in curves.items()
    ]


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each way over the seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["trained"], row["way"]), []).append(row)
    return [
        {"trained": trained, "way": way}
        | {f"median {column}": statistics.median(row[column] for row in own) for column in ("gap", "rms")}
        for (trained, way), own in found.items()
    ]


def _distance(a: float, b: float) -> float:
    return abs(a - b)


def _rms(values: list[float]) -> float:
    return statistics.fmean(value * value for value in values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bf16", action="store_true", help="autocast, as Trainer's bf16=True")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--trained", nargs="+", default=["all", "LoRA"], choices=("all", "LoRA"))
    options = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if name in options.ways}
    rows = []
    for seed in range(options.seeds):
        for trained in options.trained:
            rows += measure(ways, trained == "LoRA", options.steps, options.bf16, seed)
            print(f"seed {seed}, {trained} done", flush=True)
    report.append("fine_tune", rows, medians=medians(rows), **vars(options))
    report.print_table(f"fine-tune of {options.steps} steps", rows)
    report.print_table("over the seeds", medians(rows))


if __name__ == "__main__":
    main()
