"""Writes trained weights in files that transformers and PEFT load without finray."""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from ..common.errors import RunError
from ..config.adapter_folder import WEIGHTS_FILE
from ..config.base_digest import write_base
from ..config.model_folder import model_folder, processor_files
from ..config.recipe import Recipe
from .adapter import TRAINED
from .adapter_reference import REFERENCE
from .loading import AddedTokens, Model
from .sharding import full_tensors, is_sharded, shard_of
from .stopping import ending_turns, write_stops

Weights = dict[str, Any] | None
"""The gathered weights of a sharded model; None for a model that is not sharded."""


def gather_weights(model: Model) -> Weights:
    """Gather the weights of a sharded model to save on rank 0; all ranks call this together."""
    if not is_sharded(model):
        return None
    state = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        saved = {id(value) for value in _adapter_state(model).values()}
        state = {name: value for name, value in state.items() if id(value) in saved}
    gathered: dict[str, Any] = full_tensors(state)
    return gathered


def save_weights(model: Model, target: Path, weights: Weights = None) -> None:
    """Write the weights of a checkpoint, under the model's own names.

    Args:
        model: the trained model.
        target: the folder.
        weights: the result of `gather_weights`.
    """
    if isinstance(model, PeftModel):
        config = copy.copy(model.peft_config[TRAINED])
        _write_adapter(_adapter_state(model, weights=weights), config, target)
    else:
        model.save_pretrained(target, state_dict=weights, save_original_format=False)


@torch.no_grad()
def load_weights(model: Model, source: Path) -> None:
    """Load the weights that `save_weights` wrote; parameters keep their types and shards.

    Raises:
        RunError: the files lack weights of this model.
    """
    adapted = isinstance(model, PeftModel)
    own = _adapter_state(model) if adapted else model.state_dict(keep_vars=True)
    missing = {id(value) for value in own.values()}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as saved:
            for name in own.keys() & set(saved.keys()):
                own[name].copy_(shard_of(saved.get_tensor(name), own[name]))
                missing.discard(id(own[name]))  # a tied weight is saved under one name
    if missing:
        names = sorted(name for name, value in own.items() if id(value) in missing)
        raise RunError(
            f"the weights in {source} lack {', '.join(names[:5])} ({len(names)} in all); restore "
            "them, or start over with --fresh"
        )


def _adapter_state(
    model: PeftModel, adapter: str = TRAINED, weights: Weights = None
) -> dict[str, Any]:
    """An adapter's parameters, by their names in the saved file.

    An embedding that has an adapter stays in the base, as any other weight.
    """
    state: dict[str, Any] = get_peft_model_state_dict(
        model,
        state_dict=model.state_dict(keep_vars=True) if weights is None else weights,
        adapter_name=adapter,
        save_embedding_layers=False,
    )
    return state


def _write_adapter(tensors: dict[str, Any], config: LoraConfig, target: Path) -> None:
    """Write what PEFT reads, without its model card, which takes longer than small weights."""
    memory: set[int] = set()
    whole = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        # A file holds each tensor by itself; tied ones share their memory, also transposed.
        own = value.detach().contiguous()
        whole[name] = own.clone() if place in memory else own
        memory.add(place)
    target.mkdir(parents=True, exist_ok=True)
    save_file(whole, target / WEIGHTS_FILE, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(target))


def save_result(
    recipe: Recipe,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    weights: Weights = None,
    *,
    is_chat: bool = False,
) -> None:
    """Write the adapter (with a digest of its base) or the model, and the tokenizer.

    The result stops where samples stop.

    Args:
        recipe: the run's recipe.
        model: the trained model.
        tokenizer: the model's tokenizer.
        target: folder for the files.
        weights: the result of `gather_weights`.
        is_chat: True if the model was trained on turns of the tokenizer's chat template.
    """
    text_config = model.config.get_text_config()
    text_config.use_cache = True
    if recipe.adapter is not None and recipe.adapter.changes_base:
        _save_converted(model, target)
    elif isinstance(model, PeftModel):
        save_weights(model, target, weights)
        model.create_or_update_model_card(str(target))
    else:
        model.save_pretrained(target, state_dict=weights)
        _copy_processor(recipe, target)
    text_config.use_cache = False
    if recipe.trains_adapter:
        write_base(recipe.model, target, AddedTokens.of(recipe).names)
    if recipe.method.head == "causal":
        write_stops(model, tokenizer, target)
        tokenizer = ending_turns(tokenizer) if is_chat else tokenizer
    tokenizer.save_pretrained(target)


def _copy_processor(recipe: Recipe, target: Path) -> None:
    """Copy what makes a checkpoint of several modalities whole."""
    base = model_folder(recipe.model, only_cached=True)
    for file in [] if base is None else processor_files(base):
        shutil.copy(file, target)


@torch.no_grad()
def _save_converted(model: PeftModel, target: Path) -> None:
    """Write an adapter for the original base W, from which the initialisation took s B0 A0.

    B0 and A0 are the adapter's initial weights. (W - s B0 A0) + s B A = W + s (B A - B0 A0), an
    adapter of twice the rank. Modules that are trained whole are written as they are.
    """
    initial = _adapter_state(model, REFERENCE)
    tensors = {}
    for name, value in _adapter_state(model).items():
        kind = next((part for part in name.split(".") if part.startswith("lora_")), "")
        if kind.endswith("A"):
            tensors[name] = torch.cat([value, initial[name]])
        elif kind.endswith("B"):
            tensors[name] = torch.cat([value, -initial[name]], dim=1)
        else:
            tensors[name] = value
    _write_adapter(tensors, _twice_the_rank(model.peft_config[TRAINED], model), target)


def _twice_the_rank(config: LoraConfig, model: PeftModel) -> LoraConfig:
    """The configuration of an adapter of twice the rank with the same scaling."""
    config = copy.deepcopy(config)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    config.base_model_name_or_path = model.get_base_model().name_or_path
    return config
