"""Fine-tuning a transformers Mixture of Experts by Trainer: frozen experts, then LoRA on the experts' stacked weights.

    python examples/fine_tune.py [--steps 60] [--device cpu]

The model is a small Qwen3-MoE with random weights; its text is a song that counts. First everything but the experts is
trained: no gradient of theirs is computed, nothing is kept for one. Then peft adapts the experts alone
(`target_parameters`): the adapters' products are thin, and no tensor of the size of the weights is made. The first run
takes the experts implementation "scatter_moe", the second compiles the eager experts by the backend before Trainer gets
them: either way serves both. The adapters are saved and loaded as peft does it.
"""

import argparse
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import scatter_moe

LENGTH, BATCH = 48, 8
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}


class Song(Dataset):
    """Bytes of the verses, in pieces that begin anywhere."""

    def __init__(self) -> None:
        verses = (f"{n} green bottles hanging on the wall, and if one should fall, {n - 1}. " for n in range(99, 0, -1))
        self.tokens = torch.tensor(list("".join(verses).encode()))

    def __len__(self) -> int:
        return len(self.tokens) - LENGTH

    def __getitem__(self, start: int) -> dict[str, Tensor]:
        piece = self.tokens[start : start + LENGTH]
        return {"input_ids": piece, "labels": piece}


def new_model(experts: str = "eager") -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    settings = {**SIZES, **EXPERTS, "experts_implementation": experts, "use_cache": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


class Advance(TrainerCallback):
    """One step of a progress bar for each of Trainer's."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.task = progress, progress.add_task("training", total=steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.advance(self.task)


def train(model: nn.Module, options: argparse.Namespace, rate: float) -> list[float]:
    """Trains what requires a gradient; the loss of each step."""
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            logging_steps=1,
            bf16=options.device == "cuda",  # autocast around the forward
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=Song())
        trainer.add_callback(Advance(progress, options.steps))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    console = Console()

    def show(what: str, model: nn.Module, losses: list[float]) -> None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        console.print(f"{what}: {trained:,} parameters trained, loss {losses[0]:.3f} to {losses[-1]:.3f}")

    model = new_model("scatter_moe")
    for parameter in scatter_moe.expert_parameters(model):
        parameter.requires_grad_(False)
    show("frozen experts", model, train(model, options, rate=3e-3))

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(new_model(), LoraConfig(r=8, target_modules=[], target_parameters=targets))
    adapted.compile(backend="scatter_moe")  # before Trainer, whose own torch_compile_backend takes other names alone
    show("LoRA on experts", adapted, train(adapted, options, rate=1e-2))

    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(new_model(), folder).to(options.device)
        tokens = Song()[0]["input_ids"][None].to(options.device)
        with torch.no_grad():
            difference = (loaded(tokens).logits - adapted.forward(tokens).logits).abs().max().item()
    console.print(f"adapters saved and loaded by peft: largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    main()
