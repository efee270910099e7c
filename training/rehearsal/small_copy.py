"""The folder of a small random copy of a recipe's model, and the recipe that trains it."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..config.methods import METHODS
from ..config.model_folder import model_folder
from ..config.recipe import Recipe
from ..config.rewards import FunctionReward
from ..config.weight_checks import embedding_rows
from ..models.loading import AddedTokens
from ..models.shrunk import random_copy, shrink
from .key import RANK, cut_down

VOCABULARY = 96
ROWS = 4
"""Rows of a step, which has two microbatches."""
_GENERATIONS, _COMPLETION = 2, 6
_TOKENS = 4
"""Added tokens that a copy gets at most."""
_SHORT = re.compile(
    r".*(window|topk|top_k|chunk|block_size|pool|conv_l|conv_kernel|d_conv).*", re.I
)
_LONGEST_SHORT = 64
_SCALE, _EARLY = "floor_scale", 8
"""Llama 4 counts the tokens of a row, not of a document, and scales queries from this number on."""
_NOISE = re.compile(r".*(drop|pdrop|jitter).*", re.I)


@dataclass(frozen=True)
class SmallCopy:
    """A random model in a folder of its own, with a tokenizer."""

    folder: Path
    model: PreTrainedModel
    """As the folder holds it; in float32 on the CPU."""
    longest: int
    """Tokens of a document that is longer than any window, block or top-k of the copy."""
    trust_remote_code: bool = False
    added: tuple[str, ...] = ()
    """Tokens of `model.add_tokens`; the tokenizer lacks them, and the embedding does if the base's
    does."""

    def another(self) -> PreTrainedModel:
        """Another random model of the same kind and size; not that of the folder."""
        trust = self.trust_remote_code
        return random_copy(self.model.config, seed=0, trust_remote_code=trust)


def make_copy(recipe: Recipe, folder: Path, *, all_layers: bool = False) -> SmallCopy:
    """Write the copy of a recipe's base.

    Args:
        recipe: names the base.
        folder: an existing folder.
        all_layers: keep every layer, so that names of modules are the base's.

    Raises:
        Exception: whatever the libraries raise; then there is no copy.
    """
    settings = recipe.model
    config = AutoConfig.from_pretrained(
        settings.base,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    small = shrink(config, vocabulary=VOCABULARY, all_layers=all_layers)
    for part in _parts(small):
        _quiet(part)
        if 0 < getattr(part, _SCALE, 0) <= recipe.data.max_length:
            setattr(part, _SCALE, _EARLY)
    trust = settings.trust_remote_code
    model = random_copy(small, seed=recipe.seed, trust_remote_code=trust)
    model.config.get_text_config().use_cache = False
    model.save_pretrained(folder)
    if trust:
        _copy_code(recipe, folder)
    added = AddedTokens.of(recipe)
    names = tuple(added.names[:_TOKENS])
    rows = embedding_rows(settings) or config.get_text_config().vocab_size
    has_rows = max(added.trained, default=0) < rows
    _tokenizer(VOCABULARY - len(names) if has_rows else VOCABULARY).save_pretrained(folder)
    return SmallCopy(folder, model, max(_lengths(small)), trust, names)


def small_recipe(recipe: Recipe, copy: SmallCopy, scratch: Path) -> Recipe:
    """The recipe with the copy as its base; everything small, and in float32."""
    model, adapter = recipe.model, recipe.adapter
    if model.adapter is not None:
        _write_adapter(Path(model.adapter), copy, scratch / "start")
        model = model.model_copy(update={"adapter": str(scratch / "start")})
    if adapter is not None:
        adapter = cut_down(adapter)
    is_for_gpus = model.attention == "flash_attention_2"
    model = model.model_copy(
        update={
            "base": str(copy.folder),
            "revision": None,
            "add_tokens": list(copy.added),
            "dtype": "float32",
            "attention": "auto" if is_for_gpus else model.attention,
        }
    )
    completions = _GENERATIONS if recipe.method.samples_online else 1
    size = {"batch_size": ROWS * completions, "micro_batch_size": ROWS * completions // 2}
    optim = recipe.optim.model_copy(update={**size, "micro_batch_tokens": None})
    data = recipe.data.model_copy(update={"max_length": 4 * copy.longest + _COMPLETION})
    return recipe.model_copy(
        update={
            "model": model,
            "adapter": adapter,
            "method": _small_method(recipe),
            "optim": optim,
            "data": data,
        }
    )


def names_layers(recipe: Recipe) -> bool:
    """True if the recipe names layers by their numbers, of which the copy must have all."""
    adapter, freeze = recipe.adapter, recipe.freeze
    names: list[str] = []
    if adapter is not None:
        targets = adapter.targets
        names += targets if isinstance(targets, list) else [targets]
        names += [*adapter.modules_to_save, *adapter.rank_pattern, *adapter.alpha_pattern]
    if recipe.model.adapter is not None:
        names += _strings(_adapter_settings(Path(recipe.model.adapter)))
    if freeze is not None:
        names += freeze.train
    return any(re.search(r"\d", name) for name in names) or bool(freeze and freeze.last_layers)


def _small_method(recipe: Recipe) -> Any:
    """The method with the run's own model as its reference, and a reward without a model."""
    reward = FunctionReward(
        file="rehearsal.py:number",
        source="def number(completions, **columns):\n"
        "    return [float(number) for number in range(len(completions))]\n",
    )
    changes = {
        "reference_model": None,
        "precompute_reference": False,
        "rewards": [reward],
        "rollout": "transformers",
        "generations": _GENERATIONS,
        "max_completion": _COMPLETION,
        "mask_truncated": False,
    }
    fields = METHODS[recipe.method.kind].model_fields
    own = {name: value for name, value in changes.items() if name in fields}
    return recipe.method.model_copy(update=own)


def _write_adapter(source: Path, copy: SmallCopy, target: Path) -> None:
    """An untrained adapter on the copy with the settings of an existing one."""
    config = LoraConfig.from_pretrained(source)
    config.r = min(config.r, RANK)
    config.rank_pattern = {name: min(r, RANK) for name, r in config.rank_pattern.items()}
    config.lora_dropout = 0.0
    config.init_lora_weights = True
    config.base_model_name_or_path = str(copy.folder)
    config.trainable_token_indices = _small_rows(config.trainable_token_indices)
    get_peft_model(copy.another(), config, autocast_adapter_dtype=False).save_pretrained(
        target, save_embedding_layers=False
    )


def _small_rows(rows: Any) -> Any:
    """As many rows of the copy's embedding as an adapter trains of the model's."""
    if isinstance(rows, dict):
        return {name: _small_rows(ids) for name, ids in rows.items()}
    return None if rows is None else list(range(VOCABULARY))[-len(rows) :]


def _adapter_settings(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "adapter_config.json").read_bytes())
    names = (
        *("target_modules", "target_parameters", "modules_to_save"),
        *("rank_pattern", "alpha_pattern"),
    )
    return {name: content.get(name) for name in names}


def _strings(values: Any) -> list[str]:
    """All texts in nested values, keys included."""
    if isinstance(values, str):
        return [values]
    if isinstance(values, dict):
        return [text for pair in values.items() for part in pair for text in _strings(part)]
    return [text for part in values or () for text in _strings(part)] if values else []


def _parts(config: PretrainedConfig) -> Iterable[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _parts(part)


def _quiet(config: PretrainedConfig) -> None:
    """Without dropout and noise, so that equal inputs give equal outputs in training mode."""
    for name, value in list(vars(config).items()):
        if _NOISE.fullmatch(name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _lengths(config: PretrainedConfig) -> list[int]:
    """Lengths beyond every window, block and top-k of a configuration; at least 16."""
    values = [
        value
        for part in _parts(config)
        for name, value in vars(part).items()
        if _SHORT.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return [16, *(value + 9 for value in values if 0 < value <= _LONGEST_SHORT)]


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"t{n}": n for n in range(2, size)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")


def _copy_code(recipe: Recipe, folder: Path) -> None:
    source = model_folder(recipe.model, only_cached=True)
    for file in source.glob("*.py") if source is not None else ():
        (folder / file.name).write_bytes(file.read_bytes())
