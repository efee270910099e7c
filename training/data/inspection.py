"""A quick look at the data and the model folder, before anything heavy is imported."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..config.adapter_folder import check_adapter
from ..config.methods import DpoMethod, KtoMethod
from ..config.model_folder import has_vocabulary, model_folder
from ..config.recipe import Recipe
from ..config.reference_folder import check_reference
from ..methods import METHODS, examples_of, method_of
from ..rl.rewards.checking import check_rewards
from .chat import NO_TEMPLATE, check_chatml
from .formats import KnownFormat, normalise
from .reading import BadRow, Row
from .resolve import ResolvedSource, all_rows, resolve_source
from .shapes import Normalised, RowError, Text, is_chat, parts_of
from .sources import file_kind, parquet_metadata

_ROWS_CHECKED = 200
_COUNTED_BYTES = 64 * 2**20
_SMALL_BYTES = 8 * 2**20
"""Tokenised within the seconds that a task and its process take to start."""
_TYPICAL_COMPRESSION = 3.0


@dataclass(frozen=True)
class SourceInspection:
    """What a look at a source showed."""

    path: str
    files: int
    bytes: int
    """As stored."""
    format: KnownFormat
    rows: int
    is_exact: bool
    """Whether `rows` was counted; otherwise it is estimated from the first rows."""
    tokens: int | None
    """Estimate for all rows, without special tokens; None where there is no tokenizer.json."""


@dataclass(frozen=True)
class Inspection:
    """What a look at the recipe's data showed."""

    train: tuple[SourceInspection, ...]
    eval: tuple[SourceInspection, ...]
    model_folder: Path | None
    """The model's files; None for a hub model that is not in the cache."""

    @property
    def is_small(self) -> bool:
        """Whether the data is prepared in this process sooner than in tasks elsewhere."""
        return sum(source.bytes for source in (*self.train, *self.eval)) <= _SMALL_BYTES


@dataclass(frozen=True)
class _Look:
    """A source, and its first usable rows."""

    inspection: SourceInspection
    rows: tuple[Normalised, ...]
    """As the method learns from them."""
    per_row: float
    """How many of them a row of the source gives."""


def inspect_data(recipe: Recipe) -> Inspection:
    """Check the sources and the model folder of a recipe; takes seconds at most.

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
        check_adapter(recipe.model, method_of(recipe).head)
    method = recipe.method
    if isinstance(method, DpoMethod | KtoMethod) and method.reference_model is not None:
        check_reference(recipe.model, method.reference_model)
    tokenizer = _tokenizer(folder)
    counted = size <= _COUNTED_BYTES
    looks = [_look(source, method.kind, counted, tokenizer) for source in (*train, *held_out)]
    _check_template(recipe, folder, tokenizer, looks)
    _check_enough(recipe, train, looks[: len(train)])
    inspections = tuple(look.inspection for look in looks)
    return Inspection(inspections[: len(train)], inspections[len(train) :], folder)


def _look(source: ResolvedSource, method: str, counted: bool, tokenizer: Any) -> _Look:
    rows = all_rows(source.files)
    first = list(islice(rows, _ROWS_CHECKED))
    usable = _usable(source, method, first)
    is_parquet = [file_kind(file) == "parquet" for file in source.files]
    if all(is_parquet):
        count, is_exact = sum(parquet_metadata(file).num_rows for file in source.files), True
    elif counted:
        count, is_exact = len(first) + sum(1 for _ in rows), True
    else:
        count, is_exact = _estimated_rows(source, first), False
    examples = tuple(example for one in usable for example in one)
    per_row = len(examples) / len(usable)
    tokens = (
        None if tokenizer is None else round(_mean_tokens(tokenizer, examples) * per_row * count)
    )
    inspection = SourceInspection(
        path=source.path,
        files=len(source.files),
        bytes=sum(file.size for file in source.files),
        format=source.format,
        rows=count,
        is_exact=is_exact,
        tokens=tokens,
    )
    return _Look(inspection, examples, per_row)


def _usable(
    source: ResolvedSource, method: str, first: Sequence[tuple[str, Row | BadRow]]
) -> list[tuple[Normalised, ...]]:
    """What each usable row gives; an InputError where none is usable."""
    usable: list[tuple[Normalised, ...]] = []
    fault = ""
    for place, row in first:
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            examples = examples_of(normalise(row, source.format), method)
            usable.append(tuple(METHODS[method].adapt(example) for example in examples))
        except RowError as error:
            fault = fault or f"{place}: {error}"
    if not usable:
        raise InputError(
            f"{fault}; none of the first {len(first)} rows is usable as {source.format}"
        )
    return usable


def _estimated_rows(source: ResolvedSource, first: Sequence[tuple[str, Row | BadRow]]) -> int:
    shown = [
        row.raw if isinstance(row, BadRow) else json.dumps(row, default=str) for _, row in first
    ]
    mean = (sum(map(len, shown)) + 1) / len(shown)
    size = sum(
        file.size * (_TYPICAL_COMPRESSION if file.is_compressed else 1.0) for file in source.files
    )
    return max(1, round(size / mean))


def _mean_tokens(tokenizer: Any, rows: Iterable[Normalised]) -> float:
    encodings = tokenizer.encode_batch(["\n".join(row.contents) for row in rows])
    return sum(len(encoding.ids) for encoding in encodings) / len(encodings)


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
    recipe: Recipe, folder: Path | None, tokenizer: Any, looks: Sequence[_Look]
) -> None:
    has_chats = any(is_chat(part) for look in looks for row in look.rows for part in parts_of(row))
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
    recipe: Recipe, sources: Sequence[ResolvedSource], looks: Sequence[_Look]
) -> None:
    """A set has at most as many sequences as rows, unless long texts are split."""
    can_split = method_of(recipe).splits_overlong or any(
        isinstance(row, Text) for look in looks for row in look.rows
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
