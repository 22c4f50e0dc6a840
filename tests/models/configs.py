"""Tiny configurations of the transformers models with experts: two layers, a few experts, a vocabulary of 128."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 128

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def give_unit_scale(model: nn.Module) -> None:
    """Draws weights that keep rows at unit scale, so that experts matter to the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Model:
    """One architecture: its transformers prefix, what its configuration adds, and how many layers are MoE."""

    name: str
    extra: dict[str, Any] = field(default_factory=dict)
    moe_layers: int = 2
    top_k: int = 2
    num_experts: int = 4
    router_logits: bool = True

    def make(self, experts="eager", seed=0):
        """The causal LM in fp32 with weights of unit scale, so that experts matter to the loss."""
        config_class = getattr(transformers, f"{self.name}Config")
        config = config_class(**COMMON | self.extra, experts_implementation=experts, attn_implementation="eager")
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config)
        give_unit_scale(model)
        return model


MODELS = (
    Model("Mixtral", {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Model(
        "Qwen2Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
        },
    ),
    Model(
        "Qwen3Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "head_dim": 16,
        },
        num_experts=8,
        top_k=3,
    ),
    Model("Olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}, num_experts=8),
    Model(
        "GptOss",
        {
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
        },
    ),
    Model(
        "DeepseekV3",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
        moe_layers=1,
        num_experts=8,
        router_logits=False,
    ),
    Model("GraniteMoe", {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Model(
        "Phimoe",
        {
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.0,
        },
    ),
    Model(
        "Jamba",
        {
            "intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
        },
    ),
)


def batch(length=12, seed=0):
    """input_ids [2, S], attention_mask with some padding on the left, labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
