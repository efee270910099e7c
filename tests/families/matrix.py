"""Every architecture of the installed transformers that text can train, as a small random model."""

import shutil
from pathlib import Path

from families.published import FIELDS
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from finray.training.config.model_folder import tokenizer_files
from finray.training.models.shrunk import random_copy, shrink

CAUSAL: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
REGISTRY = {**CAUSAL, **IMAGE_TEXT}
"""Model type → class, of all that predict the next token of a text."""

_PICTURES = "it computes nothing without a picture"
_SOUND = "it speaks codes of sound, not text"
_TIMM = "its tower comes from timm, which finray does not install"
_SCIPY = "its tower needs scipy, which finray does not install"
_DRAFT = "a draft model, which reads the states of another"
_CLASS = "transformers lists it here and has no such class for its configuration"
_INCOMPLETE = "its configuration class describes no model that can be built"
_SOURCE = "an encoder-decoder, whose text comes from a source"
_HALF = "half of an encoder-decoder, for which transformers' own loss is not the next token's"

LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("blip", "blip-2", "florence2", "idefics", "instructblip", "instructblipvideo"),
            *("git", "kosmos-2", "pi0", "pix2struct", "pp_chart2table", "pp_formulanet"),
            *("vision-encoder-decoder", "udop"),
        ),
        _PICTURES,
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _SOUND),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), _TIMM),
    "inkling_mm_model": _SCIPY,
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFT),
    "evolla": _CLASS,
    **dict.fromkeys(("chameleon", "emu3", "granite4_vision", "dbrx"), _INCOMPLETE),
    "diffusion_gemma": "it writes many tokens at once, by diffusion",
    "t5gemma2": _SOURCE,
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"),
            *("mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper"),
        ),
        _HALF,
    ),
    "reformer": "in training its rows have a multiple of a chunk's length",
    "shieldgemma2": "a classifier of pictures",
    "molmo2": "in training it needs the kind of every token, which only its processor makes",
    "blt": "it groups bytes by itself, and takes no tokens",
}
"""Model type → why the matrix has no row for it."""

_LENGTH = (
    "where tokens are equal, in transformers too, a row's length decides which are attended to"
)
_PEFT = "its adapter: PEFT loads it under other names than it saves it"

FAULTS: dict[tuple[str, str], str] = {("doge", how): _LENGTH for how in ("lora", "full")}
"""(model type, lora or full) → why the result is not that of plain transformers."""

ROUNDED: dict[str, float] = {"granite_swa": 1e-2}
"""Model type → how far its adapter's logits may lie off, as a share of the largest: the gradient of
one adapter matrix is all rounding, and AdamW's steps are as long as those of any other."""

_AHEAD = "a token sees those after it"

_PADDING = "trained whole: transformers sets its padding token's row to 0 when it loads it"

REFUSED: dict[tuple[str, str], str] = {
    **{
        (kind, how): _AHEAD for kind in ("cpmant", "paligemma", "xlnet") for how in ("lora", "full")
    },
    **{(kind, "lora"): _PEFT for kind in ("deepseek_ocr2", "unlimited_ocr")},
    ("youtu", "full"): _PADDING,
}
"""(model type, lora or full) → why finray refuses it."""

REMEDIES: dict[str, str] = {
    _AHEAD: "choose a decoder",
    _PEFT: "take the section adapter out to train all weights",
    _PADDING: "train an adapter instead",
}
"""Reason of a refusal → how the message ends."""

UNSHIFTED: frozenset[str] = frozenset({"xlm"})
"""Those whose class compares logits with the labels of the same places."""

SAMPLE: frozenset[str] = frozenset(
    {
        *("llama", "gpt2", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_next"),
        *("mamba2", "nemotron_h", "lfm2", "falcon_h1", "llama4_text", "bloom", "qwen3_vl"),
        "mistral3",
    }
)
"""Fifteen of all kinds, which every change is tried on."""

TENTH: frozenset[str] = frozenset(
    {
        *("llama", "qwen3", "gpt2", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3"),
        *("qwen3_5_text", "granitemoehybrid", "nemotron_h", "falcon_h1", "lfm2", "mistral"),
        *("phi3", "glm4_moe", "olmo2", "cohere2", "gemma2", "starcoder2", "opt", "gemma3n_text"),
        *("smollm3", "olmoe", "gpt_neox", "seed_oss"),
    }
)
"""Those that are also quantised, trained on preferences, by two workers, and merged."""


LEFT_WHOLE: frozenset[str] = frozenset(
    {
        *("gpt_oss", "qwen3_moe", "deepseek_v3", "granitemoehybrid", "glm4_moe", "olmoe"),
        *("nemotron_h", "gemma3n_text"),
    }
)
"""Those of the tenth that transformers alone quantises in part, or into one that does not run."""


def architectures() -> list[str]:
    """The model types of the matrix, in the registry's order."""
    return [kind for kind in REGISTRY if kind not in LEFT_OUT]


def make_base(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A model folder with a shrunk random copy of an architecture and a tokenizer.

    Args:
        kind: its model type.
        tokenizer: a model folder whose tokenizer it gets.
        folder: where it is written.
    """
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer)
    whole = CONFIG_MAPPING[kind](**FIELDS.get(kind, {}))
    small = shrink(whole, vocabulary=len(own))
    without_dropout(small)
    text = small.get_text_config()
    for config in {id(small): small, id(text): text}.values():
        config.pad_token_id, config.eos_token_id = own.pad_token_id, own.eos_token_id
        config.bos_token_id = own.eos_token_id
    random_copy(small, seed=0).save_pretrained(folder)
    for file in tokenizer_files(tokenizer):
        shutil.copy(file, folder)
    return folder


def without_dropout(config: PretrainedConfig) -> None:
    """Losses are compared with another program's."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
            setattr(config, name, 0.0)
