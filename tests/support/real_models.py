"""The configurations of the models that recipes/ names, as published, and small stand-ins of them.

No weights are needed: memory is computed from a configuration, and a stand-in has random ones.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from finray.training.config.model_folder import tokenizer_files
from finray.training.models.logit_memory import HeadFacts
from finray.training.models.memory_estimate import Sizes

LLAMA_8B_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "dtype": "bfloat16",
}
QWEN3_4B_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000,
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "dtype": "bfloat16",
}
CONFIGS = {
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B_CONFIG,
    "Qwen/Qwen3-4B-Instruct-2507": QWEN3_4B_CONFIG,
}
"""By hub id. A recipe with another model needs its configuration here."""

LLAMA_8B = Sizes(
    linear=6_979_321_856,
    frozen=1_050_939_392,
    trained=41_943_040,
    cast=41_943_040,
    layers=32,
    hidden=4096,
    queries=4096,
    keys=1024,
    inner=14336,
    ranks=7 * 16,
    heads=32,
    vocabulary=128_256,
    outside=2 * 128_256 * 4096,
    cached_values=2 * 1024,
    cached=32 * (None,),
    largest=4096 * 14336,
    head=HeadFacts(values=128_256 * 4096),
)
"""Sizes of Llama 8B with an adapter of rank 16 on every linear layer."""

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def write_config(config: dict[str, Any], folder: Path) -> Path:
    """A model folder that holds only the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_stand_in(config: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """A model of the same architecture with random weights, every size cut.

    Args:
        config: the real model's configuration.
        tokenizer: a model folder whose tokenizer and chat template the stand-in gets.
        folder: where it is written.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"bos_token_id": None, "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id}
    small = AutoConfig.for_model(**{**config, **_SMALL, **ids, "vocab_size": len(own)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    for file in tokenizer_files(tokenizer):
        shutil.copy(file, folder)
    return folder
