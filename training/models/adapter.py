"""LoRA adapters on a frozen base: new ones, and existing ones that are trained further."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..config.adapter_folder import TASKS, WEIGHTS_FILE
from ..config.models import Head, LoraAdapter

TRAINED = "default"
"""PEFT's name for the adapter that is trained."""

# PEFT adds these modules to the adapter of a model with a score head by itself.
_SCORE_HEADS = ("classifier", "score")


def new_adapter(
    model: PreTrainedModel, settings: LoraAdapter, head: Head, *, weights: bool = True
) -> PeftModel:
    """Freeze the model and add a new LoRA adapter to its target modules.

    Args:
        model: the base; `init` pissa and olora change its weights.
        settings: the recipe's adapter. `initialise_loftq` handles `init` loftq.
        head: causal for next-token logits, score for one number per text.
        weights: False for a model on the meta device, whose adapter needs no initial values.

    Raises:
        InputError: a name or pattern matches nothing; the message lists the existing names.
    """
    _check_names(model, settings)
    init: bool | str = settings.init
    if not weights or init in ("default", "loftq"):
        init = True
    ties = bool(settings.modules_to_save) and model.config.tie_word_embeddings
    config = LoraConfig(
        task_type=TASKS[head],
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        modules_to_save=list(settings.modules_to_save) or None,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        init_lora_weights=init,
        ensure_weight_tying=ties and _has_embedding(settings.modules_to_save),
    )
    adapted = _attach(model, config)
    targets = adapted.base_model.targeted_module_names
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, field):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                raise InputError(
                    f"adapter.{field}: {pattern!r} matches no target module; the target modules "
                    f"are {list_names(targets)}"
                )
    return adapted


def existing_adapter(
    model: PreTrainedModel, folder: Path, head: Head, *, weights: bool = True
) -> PeftModel:
    """Freeze the model and add an adapter that an earlier run trained.

    A model with a new score head also accepts the adapter of a causal language model.

    Raises:
        InputError: the adapter's tensors do not match its configuration on this model.
    """
    config = LoraConfig.from_pretrained(folder)
    config.task_type = TASKS[head]
    config.inference_mode = False
    config.init_lora_weights = True
    config.base_model_name_or_path = None
    saved = [name for name in config.modules_to_save or () if name not in _SCORE_HEADS]
    config.modules_to_save = saved or None
    adapted = _attach(model, config)
    if not weights:
        return adapted
    tensors = load_file(folder / WEIGHTS_FILE)
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    new_head = {name for name in expected if head == "score" and _is_score_head(name)}
    mismatches = (expected.keys() - new_head) ^ (tensors.keys() - new_head)
    mismatches |= {
        name
        for name in expected.keys() & tensors.keys()
        if expected[name].shape != tensors[name].shape
    }
    if mismatches:
        raise InputError(
            f"model.adapter: {folder} does not fit the model: {', '.join(sorted(mismatches)[:5])} "
            f"({len(mismatches)} tensors in all) are missing, unexpected or of another shape"
        )
    head_weights = {name: expected[name] for name in new_head}
    set_peft_model_state_dict(adapted, {**head_weights, **tensors}, adapter_name=TRAINED)
    return adapted


def cast_trainable_parameters(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast all trainable parameters to `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def list_names(names: Iterable[str]) -> str:
    """Sorted names of modules or parameters for a message; layer numbers become `*`."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}))


def _attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # new_adapter refuses a pattern that matches nothing.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:  # for example a target of a kind that LoRA does not support
        raise InputError(f"adapter: {' '.join(str(error).split())}") from error
    # The initial values are set now: loading the saved adapter must not compute them again.
    config.init_lora_weights = True
    return adapted


def _check_names(model: PreTrainedModel, settings: LoraAdapter) -> None:
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    targets = settings.targets
    if isinstance(targets, list):
        short = {name.rpartition(".")[2] for name in linear}
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise InputError(
                    f"adapter.targets: {target!r} matches no module of the model; its linear "
                    f"layers are {', '.join(sorted(short))}"
                )
    elif targets != "all-linear" and not any(re.fullmatch(targets, name) for name in modules):
        raise InputError(
            f"adapter.targets: the regular expression {targets!r} matches no module's whole name; "
            f"the linear layers are {list_names(linear)}"
        )
    leaves = (name for name, module in modules.items() if not list(module.children()))
    for saved in settings.modules_to_save:
        if not any(name.endswith(saved) for name in modules):
            raise InputError(
                f"adapter.modules_to_save: {saved!r} matches no module of the model; its modules "
                f"are {list_names(leaves)}"
            )


def _has_embedding(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte") for name in names)


def _is_score_head(name: str) -> bool:
    return any(part in _SCORE_HEADS for part in name.split("."))
