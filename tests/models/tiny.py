"""Tiny models of any transformers architecture with experts, from its default configuration and a table of sizes."""

import importlib
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from docs.transformers_experts import experts_classes
from tests.models.configs import VOCAB, give_unit_scale

# Attribute names of configurations, by pattern, and the value they take. The first pattern that matches counts.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?", VOCAB),
    (r"pad_token_id|bos_token_id|eos_token_id", 1),
    (r"(image|video|audio|vision|speech|boi|eoi|boa|eoa)\w*_token_(id|index)", VOCAB - 1),
    (r"num_hidden_layers|num_layers|n_layers|depth|encoder_layers|decoder_layers", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers|first_num_dense_layers", 0),
    (
        r"num_attention_heads|num_heads|n_heads|encoder_attention_heads|linear_num_\w+_heads|mamba_n_heads|index_n_heads",
        2,
    ),
    (r"num_key_value_heads|num_global_key_value_heads|swa_num_\w+_heads", 2),
    (r"head_dim|global_head_dim|\w*_head_dim|v_head_dim|index_head_dim", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|moe_top_k|num_experts_per_token", 2),
    (r"n_group|num_expert_group|topk_group|n_groups_experts", 1),
    (r"hidden_size|d_model|embed_dim|n_embd|out_hidden_size|hidden_dim|encoder_hidden_size", 32),
    (r"\w*intermediate_size\w*|ffn_dim|mlp_dim|\w*ffn_dim|\w*ffn_hidden_size|\w*ffn_size", 24),
    (r"max_position_embeddings|original_max_position_embeddings", 128),
    (r"sliding_window|window_size|index_topk", 16),
)

SPARSE = ["sparse", "sparse"]
FOUR_LAYERS = {"num_hidden_layers": 4}  # the smallest with every kind of layer

# What an architecture needs beyond sizes: defaults that are None, or that don't go with small sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": FOUR_LAYERS,
    "beam": {"mlp_layer_types": SPARSE},
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": SPARSE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "mlp_layer_types": SPARSE,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "glm4v_moe": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}},
    "glm5_next": FOUR_LAYERS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": FOUR_LAYERS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_attention_heads": 4, "mlp_layer_types": SPARSE, "head_dim": 24, "v_head_dim": 24},
    "mistral4": {"qk_head_dim": 32, "head_dim": 32},
    "qwen3_5_moe": FOUR_LAYERS,
    "qwen3_next": FOUR_LAYERS,
    "qwen4_exp": FOUR_LAYERS
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
}


@dataclass(frozen=True)
class Architecture:
    """One modeling file of transformers that has decorated experts, and the class of its whole model."""

    name: str
    experts: tuple[str, ...]
    model_class: type[nn.Module] | None

    def make(self, experts_implementation: str | None, seed: int = 0) -> nn.Module:
        """The model in fp32 with weights of unit scale, so that experts matter to the result."""
        assert self.model_class is not None
        config = tiny(self.model_class.config_class, **SETTINGS.get(self.name, {}))
        torch.manual_seed(seed)
        model = self.model_class._from_config(
            config, attn_implementation="eager", experts_implementation=experts_implementation
        )
        give_unit_scale(model)
        return model


def architectures() -> list[Architecture]:
    """Every architecture of the installed transformers with experts behind @use_experts_implementation."""
    found = []
    for name, classes in itertools.groupby(experts_classes(), key=lambda experts: experts.model):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        found.append(Architecture(name, tuple(experts.name for experts in classes), _whole_model(module)))
    return found


def token_ids() -> torch.Tensor:
    """Two sequences of 8 tokens, none of which means anything special."""
    return torch.randint(2, VOCAB - 8, (2, 8), generator=torch.Generator().manual_seed(0))


def first_output(call: Callable, model: nn.Module) -> Callable:
    """`call`, which is the model or made from it, without a cache and with nothing but what it returns first."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return lambda input_ids: call(input_ids=input_ids, **options)[0]


def _whole_model(module) -> type[nn.Module] | None:
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for ending in ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForTokenClassification"):
        for candidate in own:
            if candidate.__name__.endswith(ending) and getattr(candidate, "config_class", None) is not None:
                return candidate
    return None


def tiny(config_class: type[PretrainedConfig], **settings: Any) -> PretrainedConfig:
    """The default configuration with every size cut down, those of its parts too."""
    default = config_class()
    values = {name: value for name, value in _shrunk(default).items() if not name.startswith("_")}
    return config_class(**values | settings)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    values = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            values[name] = _shrunk(value)
            continue
        for pattern, size in SIZES:
            if re.fullmatch(pattern, name) and isinstance(value, int) and not isinstance(value, bool):
                values[name] = min(value, size) if value >= 0 else value
                break
    return values
