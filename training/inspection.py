"""A quick check of a recipe's data, model folder and rewards, before heavy imports."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common.errors import InputError
from .common.storage import Folder
from .config.adapter_folder import check_adapter
from .config.eval_metrics import check_installed
from .config.model_folder import has_vocabulary, model_folder
from .config.places import about, locates
from .config.recipe import Recipe
from .config.reference_folder import check_reference
from .config.trackers import check_trackers
from .config.weight_checks import (
    check_adapter_weights,
    check_base_weights,
    check_named_weights,
    embedding_rows,
    text_part,
)
from .data.added_tokens import check_embedded, marks_of, tokens_to_add
from .data.chat import NO_TEMPLATE, check_chatml, check_syntax
from .data.curation.languages import check_languages
from .data.inspection import InspectedRows, SourceInspection, inspect_source
from .data.resolve import ResolvedSource, read_twice, resolve_data
from .data.shapes import Text, is_chat, parts_of
from .rl.rewards.checking import check_rewards, check_scores

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
    notes: tuple[str, ...]
    """What to say of the sources together."""

    @property
    def bytes(self) -> int:
        """Size of all sources."""
        return sum(source.bytes for source in (*self.train, *self.eval))

    @property
    def is_small(self) -> bool:
        """True if this process prepares the data faster than Ray tasks would."""
        return self.bytes <= _SMALL_BYTES


@locates
def inspect_recipe(recipe: Recipe, *, trains_here: bool = True, trains: bool = True) -> Inspection:
    """Check a recipe's sources, model folder, adapter, reference and rewards within seconds.

    Args:
        recipe: the recipe.
        trains_here: False for a run that is only planned: weights and vLLM may be elsewhere.
        trains: False where only rows are looked at, which may be fewer than a batch.

    Raises:
        InputError: a source is missing, empty, unreadable, in an unknown format, or all its first
            rows are bad; the data is smaller than a batch; the model folder lacks its
            configuration, weights, tokenizer or chat template, or its weights are damaged;
            data.max_length exceeds the model's
            positions; model.adapter or method.reference_model does not fit the model; or a
            reward is wrong, see `check_rewards`.
    """
    check_languages(recipe)
    check_scores(recipe)
    check_rewards(recipe, trains_here=trains_here)
    check_installed(recipe.eval.metrics, "eval.metrics")
    data = resolve_data(recipe)
    size = sum(file.size for source in (*data.train, *data.eval) for file in source.files)
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
    inspected: dict[str, list[InspectedRows]] = {}
    for split, sources in (("train", data.train), ("eval", data.eval)):
        inspected[split] = []
        for index, source in enumerate(sources):
            with about(f"data.{split}.{index}"):
                rows = inspect_source(source, recipe.method, recipe.data.max_row_bytes, count_all)
            inspected[split].append(rows)
    _check_template(recipe, folder, tokenizer, [*inspected["train"], *inspected["eval"]])
    if trains:
        _check_enough(recipe, data.train, inspected["train"])
    if trains and trains_here:
        _check_weights(recipe)
    return Inspection(
        tuple(rows.inspection for rows in inspected["train"]),
        tuple(rows.inspection for rows in inspected["eval"]),
        folder,
        tuple(read_twice(recipe, data)),
    )


@locates
def check_log(recipe: Recipe) -> None:
    """Check that all of `log.to` can be used from this process.

    Raises:
        InputError: a package or a key is absent.
    """
    check_trackers(recipe.log.to)


@locates
def check_storage(recipe: Recipe, writes: bool = True) -> None:
    """Check that the storage is a folder in which this process can write.

    Args:
        recipe: the recipe.
        writes: False for a run that is only read.

    Raises:
        InputError: it is a file, cannot be reached, or is read-only.
    """
    with about("storage"):
        storage = Folder(recipe.storage)
        storage.require_folder()
        if writes:
            storage.require_writable()
            (storage / recipe.name).require_writable()


def _tokenizer(folder: Path | None) -> Any:
    """The fast tokenizer of a model folder, or None if it has none."""
    if folder is None or not (folder / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 — tokenizers raises nothing more precise
        raise InputError(
            f"model.base: {folder}/tokenizer.json: not a usable tokenizer: {error}; save the "
            "tokenizer again"
        ) from None
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


def _check_weights(recipe: Recipe) -> None:
    if not recipe.method.starts_at_random:
        check_base_weights(recipe.model, recipe.method.head)
    if recipe.model.adapter is not None:
        check_adapter_weights(Path(recipe.model.adapter), "model.adapter")
    if recipe.method.reference_name is not None:
        check_named_weights(recipe.method.reference_name, "causal", "method.reference_model")


def _positions(config: dict[str, Any]) -> float | None:
    """Number of positions that the model can use; a scaled RoPE extends those of its training."""
    text = text_part(config)
    positions = text.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    factor = rope.get("factor")
    return positions * max(1.0, factor) if isinstance(factor, int | float) else positions


def _check_template(
    recipe: Recipe, folder: Path | None, tokenizer: Any, inspected: Sequence[InspectedRows]
) -> None:
    template = recipe.data.chat_template
    if template is not None and template != "chatml":
        check_syntax(template)
    has_chats = any(
        is_chat(part)
        for rows in inspected
        for example in rows.examples
        for part in parts_of(example)
    )
    if not has_chats or folder is None:
        return
    if recipe.data.chat_template is None and not _has_template(folder):
        raise InputError(NO_TEMPLATE)
    if tokenizer is not None:
        _check_marks(recipe, tokenizer.get_vocab())


def _check_marks(recipe: Recipe, vocabulary: dict[str, int]) -> None:
    """Check that the template's marks are tokens, with rows of the embedding."""
    template = recipe.data.chat_template
    added = tokens_to_add(recipe.model.add_tokens, vocabulary, template)
    if template == "chatml":
        check_chatml({*vocabulary, *added})
    rows = embedding_rows(recipe.model)
    marks = {vocabulary[mark]: mark for mark in marks_of(template) if mark in vocabulary}
    if rows is not None:
        check_embedded({i: mark for i, mark in marks.items() if mark not in added}, rows)


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
    can_split = (recipe.method.splits_overlong or recipe.data.overlong == "split") or any(
        isinstance(example, Text) for rows in inspected for example in rows.examples
    )
    if can_split or not all(rows.inspection.is_exact for rows in inspected):
        return
    total = sum(
        rows.inspection.rows * rows.per_row * source.weight
        for source, rows in zip(sources, inspected, strict=True)
    )
    left = round(total * (1 - recipe.data.held_out_share))
    bad = [line for rows in inspected for line in rows.bad]
    if left - len(bad) < recipe.rows_per_step:
        _check_bad_rows(recipe, bad, sum(rows.inspection.rows for rows in inspected))
        left -= len(bad)
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} needs {recipe.rows_per_step} rows per "
            f"step, but the data has only {left} rows to train on; lower batch_size, or add data"
        )


def _check_bad_rows(recipe: Recipe, bad: Sequence[str], rows: int) -> None:
    """Refuse bad rows, which the preparation would refuse: they are the cause."""
    if len(bad) > recipe.data.max_bad_rows * rows:
        first = "\n".join(f"  {line}" for line in bad[:3])
        raise InputError(
            f"{len(bad)} of {rows} rows cannot be used; data.max_bad_rows allows "
            f"{recipe.data.max_bad_rows:.1%}. The first ones:\n{first}"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if the file does not exist."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(
            f"model.base: {path}: not valid JSON: {error}; save the model again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"model.base: {path}: expected a JSON object; save the model again")
    return content
