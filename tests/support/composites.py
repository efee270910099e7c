"""Tiny random vision-language models, as transformers writes their checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

from finray.training.config.model_folder import tokenizer_files

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,  # as many as the language model
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_VISUAL: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_SIGHTED: dict[str, Any] = {"image_token_id": 299, "tie_word_embeddings": False}
_MARKS: dict[str, Any] = {
    "video_token_id": 298,
    "vision_start_token_id": 297,
    "vision_end_token_id": 296,
}
_GEMMA: dict[str, Any] = {
    **_TEXT,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_GEMMA, "query_pre_attn_scalar": 8},
        "vision_config": _TOWER,
        "mm_tokens_per_image": 4,
        "image_token_index": 299,
        "boi_token_index": 298,
        "eoi_token_index": 297,
        "tie_word_embeddings": True,
    },
    "gemma4": {
        "text_config": {
            **_GEMMA,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 16,
        },
        "audio_config": None,
        **_SIGHTED,
        "video_token_id": 298,
        "tie_word_embeddings": True,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_scaling": _MROPE},
        "vision_config": {**_VISUAL, "fullatt_block_indexes": [0], "window_size": 16},
        **_SIGHTED,
        **_MARKS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_scaling": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {
            **_VISUAL,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_SIGHTED,
        **_MARKS,
    },
    "qwen3_5": {
        "text_config": {**_TEXT, **_LINEAR},
        "vision_config": {**_VISUAL, "num_position_embeddings": 16},
        **_SIGHTED,
        **_MARKS,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 299,
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": 299,
        "tie_word_embeddings": False,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _TOWER,
        "scale_factor": 2,
        **_SIGHTED,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _TOWER,
        "scale_factor": 2,
        **_SIGHTED,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        **_SIGHTED,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
        "vision_config": {
            **_TOWER,
            "intermediate_size": 64,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        "image_token_index": 299,
        "tie_word_embeddings": False,
    },
}
"""By model type; 300 tokens."""


def make_composite(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A checkpoint of this type, with the tokenizer (of at most 300 tokens) of another model."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"pad_token_id": own.pad_token_id, "eos_token_id": own.eos_token_id, "vocab_size": 300}
    values = CONFIGS[kind]
    config = AutoConfig.for_model(
        kind, **{**values, "text_config": {**values["text_config"], **ids}}
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for file in tokenizer_files(tokenizer):
        shutil.copy(file, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 28}), encoding="utf-8")
    return folder
