"""Tiny configurations of any transformers model, from its defaults and a table of sizes, and how it is called."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from tests.models.configs import VOCAB

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
    (r"zero_expert_num", 2),
    (r"hidden_size|d_model|embed_dim|n_embd|out_hidden_size|hidden_dim|encoder_hidden_size", 32),
    (r"\w*intermediate_size\w*|ffn_dim|mlp_dim|\w*ffn_dim|\w*ffn_hidden_size|\w*ffn_size", 24),
    (r"max_position_embeddings|original_max_position_embeddings", 128),
    (r"sliding_window|window_size|index_topk", 16),
)

SPARSE = ["sparse", "sparse"]
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
BEFORE_5 = VERSION < (5, 0)
NEED_A_MASK = frozenset(("Glm4vMoeTextModel",)) if BEFORE_5 else frozenset()
"""Without one these look for packed sequences, of which their three-dimensional positions tell nothing."""


def mrope(*sections: int) -> dict[str, Any]:
    """How many frequencies each of three positions has."""
    settings = {"rope_type": "default", "mrope_section": list(sections)}
    return {"rope_scaling": settings} if BEFORE_5 else {"rope_parameters": {"rope_theta": 1e4} | settings}


FOUR_LAYERS = {"num_hidden_layers": 4}  # the smallest with every kind of layer

# What an architecture needs beyond sizes: defaults that are None, or that don't go with small sizes.
SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": FOUR_LAYERS,
    "beam": {"mlp_layer_types": SPARSE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
        | ({} if BEFORE_5 else {"hidden_size": 32}),
    },
    "deepseek_ocr2": {"num_experts_per_tok": 2, "mlp_layer_types": SPARSE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"qk_head_dim": 32},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 24],
        "mlp_layer_types": SPARSE,
        **mrope(3, 3, 2),
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "glm4v_moe": mrope(1, 1, 2),
    "glm5_next": FOUR_LAYERS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "gptsan_japanese": {"num_switch_layers": 2, "num_ext_layers": 0, "dropout_rate": 0.0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": 16, "head_dim": 16, "num_attention_heads": 4},
    "kimi_linear": FOUR_LAYERS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "mimo_v2_flash": {"num_attention_heads": 4, "mlp_layer_types": SPARSE, "head_dim": 24, "v_head_dim": 24},
    "mistral4": {"qk_head_dim": 32, "head_dim": 32},
    "nllb_moe": {
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_token_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    },
    "qwen3_5_moe": FOUR_LAYERS,
    "qwen3_next": FOUR_LAYERS,
    "qwen3_omni_moe": mrope(3, 3, 2) if BEFORE_5 else {},
    "qwen3_vl_moe": mrope(3, 3, 2) if BEFORE_5 else {},
    "qwen4_exp": FOUR_LAYERS
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "step3p7": {"sliding_window": 16, "mlp_layer_types": SPARSE},
    "switch_transformers": {
        "dropout_rate": 0.0,
        "num_decoder_layers": 2,
        # Of 4.36 every layer but those of odd numbers is dense.
        "num_sparse_decoder_layers": 1 if VERSION < (4, 45) else 2,
    },
}


def token_ids() -> torch.Tensor:
    """Two sequences of 8 tokens, none of which means anything special."""
    return torch.randint(2, VOCAB - 8, (2, 8), generator=torch.Generator().manual_seed(0))


def first_output(call: Callable, model: nn.Module) -> Callable:
    """`call`, which is the model or made from it, without a cache and with nothing but what it returns first."""
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    if type(model).__name__ in NEED_A_MASK:
        options["attention_mask"] = torch.ones_like(token_ids())
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = token_ids()
    return lambda input_ids: call(input_ids=input_ids, **options)[0]


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
