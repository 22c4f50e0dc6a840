"""Tiny models of transformers with LoRA on the stacked weights of their experts, by peft."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

from tests.models.configs import MODELS, Model

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
BY_NAME = {model.name: model for model in MODELS}
QWEN3, GPT_OSS = BY_NAME["Qwen3Moe"], BY_NAME["GptOss"]  # weights [E, out, in], and [E, in, out] with biases


def lora(model: Model, experts: str, *, rank: int = 2, seed: int = 0, dtype: torch.dtype | None = None) -> PeftModel:
    """Adapters whose products are of the size of the weights; everything else is frozen."""
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["q_proj"], target_parameters=PARAMETERS)
    module = model.make(experts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        adapted = get_peft_model(module if dtype is None else module.to(dtype), config)
    draw(adapted, seed)
    return adapted


def draw(model: torch.nn.Module, seed: int) -> None:
    """Adapters of unit scale: as peft starts them, they add nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
