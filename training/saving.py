"""Writing what was trained, so that transformers and PEFT load it without finray."""

import tempfile
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from .adapter import TRAINED
from .base_identity import write_base
from .existing_adapter import WEIGHTS_FILE
from .model import Model
from .recipe import Recipe
from .reference import REFERENCE


def save_weights(model: Model, target: Path) -> None:
    """The weights alone, as a checkpoint needs them."""
    if isinstance(model, PeftModel):
        model.save_pretrained(target, selected_adapters=[TRAINED])
    else:
        model.save_pretrained(target)


def load_weights(model: PeftModel, source: Path) -> None:
    """Take an adapter's weights from a checkpoint; each keeps its type, which PEFT would raise."""
    set_peft_model_state_dict(model, load_file(source / WEIGHTS_FILE), adapter_name=TRAINED)


def save_result(
    recipe: Recipe, model: Model, tokenizer: PreTrainedTokenizerBase, target: Path
) -> None:
    """The adapter (with a note of its base) or the model, and the tokenizer."""
    model.config.use_cache = True
    if recipe.adapter is not None and recipe.adapter.changes_base:
        _save_converted(model, target)
    else:
        save_weights(model, target)
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
