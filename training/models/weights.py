"""Writing what was trained, so that transformers and PEFT load it without finray."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from ..common.errors import RunError
from ..config.base_digest import write_base
from ..config.recipe import Recipe
from .adapter import TRAINED
from .adapter_reference import REFERENCE
from .loading import Model
from .sharding import is_sharded, shard_of, whole

Weights = dict[str, Any] | None
"""A sharded model's weights, gathered; None for a model that has its own whole."""


def gather_weights(model: Model) -> Weights:
    """What of a sharded model is to be saved, on rank 0; all ranks call it together."""
    if not is_sharded(model):
        return None
    state = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        saved = {id(value) for value in _adapter_state(model).values()}
        state = {name: value for name, value in state.items() if id(value) in saved}
    gathered: dict[str, Any] = whole(state)
    return gathered


def save_weights(model: Model, target: Path, weights: Weights = None) -> None:
    """The weights alone, as a checkpoint needs them: under the model's own names.

    Args:
        model: whose they are.
        target: a folder.
        weights: what `gather_weights` gave.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(target, selected_adapters=[TRAINED], state_dict=weights)
    else:
        model.save_pretrained(target, state_dict=weights, save_original_format=False)


@torch.no_grad()
def load_weights(model: Model, source: Path) -> None:
    """Take the weights that `save_weights` wrote; each keeps its own type, and its shards.

    Raises:
        RunError: they are another model's.
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
        raise RunError(f"the weights in {source} lack {', '.join(names[:5])} ({len(names)} in all)")


def _adapter_state(model: PeftModel) -> dict[str, Any]:
    """The trained adapter's parameters under the names that they are saved by."""
    state: dict[str, Any] = get_peft_model_state_dict(
        model,
        state_dict=model.state_dict(keep_vars=True),
        adapter_name=TRAINED,
        save_embedding_layers=False,
    )
    return state


def save_result(
    recipe: Recipe,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    weights: Weights = None,
) -> None:
    """The adapter (with a note of its base) or the model, and the tokenizer."""
    model.config.use_cache = True
    if recipe.adapter is not None and recipe.adapter.changes_base:
        _save_converted(model, target)
    elif isinstance(model, PeftModel):
        save_weights(model, target, weights)
    else:
        model.save_pretrained(target, state_dict=weights)
    model.config.use_cache = False
    if recipe.trains_adapter:
        write_base(recipe.model, target)
    tokenizer.save_pretrained(target)


def _save_converted(model: PeftModel, target: Path) -> None:
    """Write the adapter for the whole base, of which its first weights B0 A0 had been taken.

    (W - s B0 A0) + s B A = W + s (B A - B0 A0), an adapter of twice the rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[REFERENCE])
        initial = Path(folder) / "initial"
        (Path(folder) / REFERENCE).rename(initial)
        model.save_pretrained(
            target,
            selected_adapters=[TRAINED],
            path_initial_model_for_weight_conversion=str(initial),
        )
