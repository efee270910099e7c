"""Tiny random mixtures of experts of many architectures."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

TOKENS = torch.arange(3, 67).reshape(2, 32)

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_SHARED = {"shared_expert_intermediate_size": 48}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "qwen2_moe": {**_EXPERTS, **_SHARED},
    "qwen3_5_moe_text": {**_EXPERTS, **_SHARED, **_LINEAR, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "glm4_moe": {**_ROUTED, "head_dim": 16},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "llama4_text": {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 48},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "deepseek_v4": _ROUTED,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
}
"""Settings of configurations that make a tiny model, by model type."""


def mixture(kind: str, **settings: Any) -> PreTrainedModel:
    """A model with random weights of a kind of `MIXTURES`."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**_COMMON, **MIXTURES[kind], **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def saved_mixture(kind: str, folder: Path, **settings: Any) -> Path:
    """The folder of such a model."""
    mixture(kind, **settings).save_pretrained(folder)
    return folder
