"""Train one Mixture-of-Experts language model three ways: eager, torch.compile, torch.compile by scatter_moe.

    python examples/quickstart.py [--model qwen3 | mixtral | modulelist] [--device cpu | cuda] [--steps 200]

The model is an unmodified one of transformers with its eager experts (a Python loop), or the hand-written one in
``modulelist_moe.py``. It reads bytes; the text is the source code of Python's standard library. All three runs start
from the same weights and see the same batches; all that differs between them is the call of ``torch.compile``.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from modulelist_moe import ModuleListMoE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import scatter_moe

BYTES = 256
WARM_UP = 10  # steps that the median step time leaves out
EARLY = 50  # steps in which rounding has not been amplified yet
console = Console()


@dataclass(frozen=True)
class Size:
    """What the model and its batches measure."""

    layers: int
    width: int
    heads: int
    num_experts: int
    top_k: int
    expert_width: int
    batch: int
    sequence: int
    dtype: torch.dtype


SIZES = {
    "cpu": Size(2, 192, 6, 16, 2, 96, batch=8, sequence=128, dtype=torch.float32),
    "cuda": Size(4, 1024, 16, 32, 4, 1024, batch=8, sequence=1024, dtype=torch.bfloat16),
}

# The three ways to train: what is done to the model before the first step.
WAYS: dict[str, Callable[[nn.Module], Callable]] = {
    "eager": lambda model: model,
    "torch.compile": lambda model: torch.compile(model),
    "scatter_moe": lambda model: torch.compile(model, backend="scatter_moe"),
}


def qwen3(size: Size) -> nn.Module:
    config = Qwen3MoeConfig(
        num_experts=size.num_experts,
        moe_intermediate_size=size.expert_width,
        norm_topk_prob=True,
        **_common_settings(size),
    )
    return Qwen3MoeForCausalLM(config)


def mixtral(size: Size) -> nn.Module:
    config = MixtralConfig(
        num_local_experts=size.num_experts,
        intermediate_size=size.expert_width,
        **_common_settings(size),
    )
    return MixtralForCausalLM(config)


def modulelist(size: Size) -> nn.Module:
    return ModuleListMoE(
        BYTES, size.sequence, size.layers, size.width, size.heads, size.expert_width, size.num_experts, size.top_k
    )


def _common_settings(size: Size) -> dict:
    return {
        "vocab_size": BYTES,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 2,
        "num_experts_per_tok": size.top_k,
        "max_position_embeddings": size.sequence,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": False,
        "experts_implementation": "eager",  # transformers' own Python loop over the experts
    }


MODELS: dict[str, Callable[[Size], nn.Module]] = {"qwen3": qwen3, "mixtral": mixtral, "modulelist": modulelist}


def standard_library() -> Tensor:
    """The bytes of every module at the top of Python's standard library."""
    folder = Path(os.__file__).parent
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, size: Size, steps: int, device: str) -> list[Tensor]:
    """Random windows of the text, the same in every run: int64 ``[batch, sequence]`` each."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - size.sequence, (steps, size.batch, 1), generator=generator)
    return list(text[starts + torch.arange(size.sequence)].long().to(device))


@dataclass(frozen=True)
class Run:
    """What one way of training gave."""

    losses: list[float]
    seconds: list[float]  # of each step

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a step, without the first ones."""
        return 1e3 * statistics.median(self.seconds[min(WARM_UP, len(self.seconds) - 1) :])

    @property
    def first_step(self) -> float:
        """Seconds of the first step: compilation."""
        return self.seconds[0]


def train(forward: Callable, model: nn.Module, data: list[Tensor], report: Callable) -> Run:
    """A plain training loop; `forward` is the model, or what torch.compile made of it."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=len(data), pct_start=0.1)
    run = Run([], [])
    for tokens in data:
        start = time.perf_counter()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        report(advance=1, loss=run.losses[-1])
    return run


def train_all_ways(model: nn.Module, data: list[Tensor]) -> dict[str, Run]:
    """Train the model each way, from the same weights; it keeps those of the last run."""
    start = copy.deepcopy(model.state_dict())
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs = {}
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as progress:
        for name, compile_model in WAYS.items():
            torch.compiler.reset()
            model.load_state_dict(start)
            task = progress.add_task(name, total=len(data), loss=float("nan"))
            runs[name] = train(compile_model(model), model, data, partial(progress.update, task))
            if not console.is_terminal:  # where no bars are drawn
                console.print(f"{name}: {len(data)} steps in {sum(runs[name].seconds):.0f} s")
    return runs


@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, length: int, size: Size, device: str) -> str:
    """Continue a prompt, one sampled byte at a time."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(length):
        logits = model(input_ids=tokens[:, -size.sequence :]).logits[:, -1].float()
        next_byte = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, next_byte], dim=1)
    text = bytes(tokens[0].tolist()).decode(errors="replace")
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def print_summary(runs: dict[str, Run]) -> None:
    eager = runs["eager"]
    caption = (
        f"step: median after {WARM_UP}; loss: mean of the last 10; gap: largest difference to eager's loss, early: in "
        f"the first {EARLY} steps. Each way rounds in an order of its own and training amplifies that: later on curves "
        "part, as those of two eager runs do whose weights differ in the seventh digit."
    )
    table = Table(title="Training", caption=caption)
    for column in ("", "first step, s", "step, ms", "speed-up", "loss", "early gap", "gap"):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for name, run in runs.items():
        loss, speed_up = statistics.mean(run.losses[-10:]), eager.step_ms / run.step_ms
        gaps = [abs(a - b) for a, b in zip(run.losses, eager.losses, strict=True)]
        numbers = (
            f"{run.first_step:.1f} {run.step_ms:.1f} {speed_up:.2f} {loss:.3f} {max(gaps[:EARLY]):.1e} {max(gaps):.1e}"
        )
        table.add_row(name, *numbers.split())
    console.print(table)


def save_picture(runs: dict[str, Run], title: str, path: Path) -> None:
    """Loss curves on the left, step times on the right."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title)
    curves, times = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, run), style in zip(runs.items(), ("-", "--", ":"), strict=True):
        curves.plot(run.losses, style, label=name)
    curves.set(xlabel="step", ylabel="loss (nats a byte)")
    curves.legend()
    bars = times.bar(list(runs), [run.step_ms for run in runs.values()], color=["C0", "C1", "C2"])
    times.bar_label(bars, fmt="%.0f")
    times.margins(y=0.1)
    times.set(ylabel="median step (ms)")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    size, device, steps = SIZES[arguments.device], arguments.device, arguments.steps
    text = standard_library()
    torch.manual_seed(0)
    model = MODELS[arguments.model](size).to(device, size.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{arguments.model} on {device}: {parameters:,} parameters, {len(text):,} bytes of text")
    console.print(size)

    data = batches(text, size, steps, device)
    scatter_moe.explain(model, input_ids=data[0], labels=data[0])
    runs = train_all_ways(model, data)
    print_summary(runs)

    console.rule("what the model writes")
    console.print(generate(model, b"    def ", 200, size, device), markup=False, highlight=False)
    picture = Path("runs") / f"quickstart-{arguments.model}-{device}.png"
    save_picture(runs, f"{arguments.model} on {device}, {parameters / 1e6:.1f} M parameters", picture)
    console.print(f"Curves and times: {picture}")


if __name__ == "__main__":
    sys.exit(main())
