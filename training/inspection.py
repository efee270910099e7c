"""A quick look at a recipe's data, model folder and rewards, before anything heavy is imported."""

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
"""Tokenised within the seconds that a task and its process take to start."""


@dataclass(frozen=True)
class Inspection:
    """The sources of a recipe's data, and its model folder."""

    train: tuple[SourceInspection, ...]
    eval: tuple[SourceInspection, ...]
    model_folder: Path | None
    """The model's files; None for a hub model that is not in the cache."""

    @property
    def is_small(self) -> bool:
        """Whether the data is prepared in this process sooner than in tasks elsewhere."""
        return sum(source.bytes for source in (*self.train, *self.eval)) <= _SMALL_BYTES


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Check a recipe's sources, model folder, adapter, reference and rewards, in seconds at most.

    Raises:
        InputError: for missing, empty or unreadable sources, unknown formats, a source whose
            first rows are all bad, less data than a batch, and a model folder that lacks its
            configuration, tokenizer, chat template or room for data.max_length tokens, a
            model.adapter or method.reference_model that does not fit the model, and rewards as
            `check_rewards`.
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
    counted = size <= _COUNTED_BYTES
    looks = [
        inspect_source(source, recipe.method.kind, counted, tokenizer)
        for source in (*train, *held_out)
    ]
    _check_template(recipe, folder, tokenizer, looks)
    _check_enough(recipe, train, looks[: len(train)])
    inspections = tuple(look.inspection for look in looks)
    return Inspection(inspections[: len(train)], inspections[len(train) :], folder)


def _tokenizer(folder: Path | None) -> Any:
    """The fast tokenizer of a model folder, or None where there is none."""
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
    room = _positions(config)
    if room is not None and recipe.data.max_length > room:
        raise InputError(
            f"data.max_length: {recipe.data.max_length} tokens, where the model takes at most "
            f"{room:g} (max_position_embeddings); lower data.max_length"
        )


def _positions(config: dict[str, Any]) -> float | None:
    """Positions the model can use; a scaled RoPE reaches beyond those it was trained with."""
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    factor = rope.get("factor")
    return positions * max(1.0, factor) if isinstance(factor, int | float) else positions


def _check_template(
    recipe: Recipe, folder: Path | None, tokenizer: Any, looks: Sequence[InspectedRows]
) -> None:
    has_chats = any(
        is_chat(part) for look in looks for row in look.examples for part in parts_of(row)
    )
    if not has_chats or folder is None:
        return
    if recipe.data.chat_template == "chatml" and tokenizer is not None:
        check_chatml(tokenizer.get_vocab())
    if recipe.data.chat_template is None and not _has_template(folder):
        raise InputError(NO_TEMPLATE)


def _has_template(folder: Path) -> bool:
    named = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((folder / name).exists() for name in named):
        return True
    return bool((_read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def _check_enough(
    recipe: Recipe, sources: Sequence[ResolvedSource], looks: Sequence[InspectedRows]
) -> None:
    """A set has at most as many sequences as rows, unless long texts are split."""
    can_split = recipe.method.splits_overlong or any(
        isinstance(row, Text) for look in looks for row in look.examples
    )
    if can_split or not all(look.inspection.is_exact for look in looks):
        return
    rows = sum(
        look.inspection.rows * look.per_row * source.weight
        for source, look in zip(sources, looks, strict=True)
    )
    left = round(rows * (1 - recipe.data.holdout))
    if left < recipe.rows_per_step:
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} takes {recipe.rows_per_step} rows a "
            f"step, and the data gives only {left} rows to train on; lower batch_size, or give "
            "more data"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object in a file, or None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content
