"""A quick check of a recipe's data, model folder and rewards, before heavy imports."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common.errors import InputError
from .config.adapter_folder import check_adapter
from .config.model_folder import has_vocabulary, model_folder
from .config.recipe import Recipe
from .config.reference_folder import check_reference
from .data.chat import NO_TEMPLATE, check_chatml
from .data.inspection import InspectedRows, SourceInspection, inspect_source
from .data.resolve import ResolvedSource, resolve_source
from .data.shapes import Text, is_chat, parts_of
from .rl.rewards.checking import check_rewards

_COUNTED_BYTES = 64 * 2**20
_SMALL_BYTES = 8 * 2**20
"""Data of this size is tokenised faster than a Ray task and its process start."""


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection: the data sources, and the model folder."""

    train: tuple[SourceInspection, ...]
    eval: tuple[SourceInspection, ...]
    model_folder: Path | None
    """The folder with the model's files; None for a hub model that is not in the local cache."""

    @property
    def is_small(self) -> bool:
        """True if this process prepares the data faster than Ray tasks would."""
        return sum(source.bytes for source in (*self.train, *self.eval)) <= _SMALL_BYTES


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Check a recipe's sources, model folder, adapter, reference and rewards within seconds.

    Raises:
        InputError: a source is missing, empty, unreadable, in an unknown format, or all its first
            rows are bad; the data is smaller than a batch; the model folder lacks its
            configuration, tokenizer or chat template; data.max_length exceeds the model's
            positions; model.adapter or method.reference_model does not fit the model; or a
            reward is wrong, see `check_rewards`.
    """
    check_rewards(recipe)
    train = [resolve_source(source) for source in recipe.data.train]
    held_out = [resolve_source(source) for source in recipe.data.eval]
    size = sum(file.size for source in (*train, *held_out) for file in source.files)
    folder = model_folder(recipe.model, only_cached=True)
    if folder is not None:
        _check_model(folder, recipe)
    if recipe.model.adapter is not None:
        check_adapter(recipe.model, recipe.method.head)
    reference = recipe.method.reference_name
    if reference is not None:
        check_reference(recipe.model, reference)
    tokenizer = _tokenizer(folder)
    count_all = size <= _COUNTED_BYTES
    inspected = [
        inspect_source(source, recipe.method.kind, count_all, tokenizer)
        for source in (*train, *held_out)
    ]
    _check_template(recipe, folder, tokenizer, inspected)
    _check_enough(recipe, train, inspected[: len(train)])
    inspections = tuple(rows.inspection for rows in inspected)
    return Inspection(inspections[: len(train)], inspections[len(train) :], folder)


def _tokenizer(folder: Path | None) -> Any:
    """The fast tokenizer of a model folder, or None if it has none."""
    if folder is None or not (folder / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 — tokenizers raises nothing more precise
        raise InputError(f"{folder}/tokenizer.json: not a usable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_model(folder: Path, recipe: Recipe) -> None:
    config = _read_json(folder / "config.json")
    if config is None:
        raise InputError(
            f"model.base: {folder} has no config.json; expected a model folder as transformers "
            "writes it, or a hub id"
        )
    if not has_vocabulary(folder):
        raise InputError(
            f"model.base: {folder} is a model folder without a tokenizer; save the tokenizer "
            "there too (tokenizer.json, tokenizer_config.json)"
        )
    positions = _positions(config)
    if positions is not None and recipe.data.max_length > positions:
        raise InputError(
            f"data.max_length: {recipe.data.max_length} tokens, but the model takes at most "
            f"{positions:g} (max_position_embeddings); lower data.max_length"
        )


def _positions(config: dict[str, Any]) -> float | None:
    """Number of positions that the model can use; a scaled RoPE extends those of its training."""
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    factor = rope.get("factor")
    return positions * max(1.0, factor) if isinstance(factor, int | float) else positions


def _check_template(
    recipe: Recipe, folder: Path | None, tokenizer: Any, inspected: Sequence[InspectedRows]
) -> None:
    has_chats = any(
        is_chat(part)
        for rows in inspected
        for example in rows.examples
        for part in parts_of(example)
    )
    if not has_chats or folder is None:
        return
    if recipe.data.chat_template == "chatml" and tokenizer is not None:
        check_chatml(tokenizer.get_vocab())
    if recipe.data.chat_template is None and not _has_template(folder):
        raise InputError(NO_TEMPLATE)


def _has_template(folder: Path) -> bool:
    names = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((folder / name).exists() for name in names):
        return True
    return bool((_read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def _check_enough(
    recipe: Recipe, sources: Sequence[ResolvedSource], inspected: Sequence[InspectedRows]
) -> None:
    """Refuse training data with fewer rows than a step uses.

    Packing only reduces the number of sequences, so rows are an upper bound, except where long
    texts are split.
    """
    can_split = recipe.method.splits_overlong or any(
        isinstance(example, Text) for rows in inspected for example in rows.examples
    )
    if can_split or not all(rows.inspection.is_exact for rows in inspected):
        return
    total = sum(
        rows.inspection.rows * rows.per_row * source.weight
        for source, rows in zip(sources, inspected, strict=True)
    )
    left = round(total * (1 - recipe.data.holdout))
    if left < recipe.rows_per_step:
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} needs {recipe.rows_per_step} rows per "
            f"step, but the data has only {left} rows to train on; lower batch_size, or add data"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if the file does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content
