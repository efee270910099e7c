"""A look at the rows of a first recipe: their shape, their number, and their lengths."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...training.common.errors import InputError
from ...training.config.paths import exists, resolve_path
from ...training.config.places import about
from ...training.config.recipe import Recipe
from ...training.config.source import KnownFormat, Source
from ...training.data.chat import NO_TEMPLATE
from ...training.data.expand import expand
from ...training.data.formats import detect_format, refuse_steps
from ...training.data.inspection import inspect_source
from ...training.data.resolve import all_rows, resolve_data
from ...training.data.row_changes import UNCHANGED
from ...training.data.rows import BadRow, Row
from ...training.data.sample import measure_sample
from ...training.data.shapes import (
    Completion,
    Example,
    LabelledExample,
    PreferencePair,
    RowError,
)

_OPTION = "--data"
_RENAME = "rename yours in the file, or write a recipe whose data.train renames them with columns"
_FIRST = 200
_COUNTED_BYTES = 64 * 2**20
_ROW_BYTES = 16 * 2**20
_CHARACTERS = 3.5
"""Of a token, about, where there is no tokenizer."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_QUESTIONS = ("instruction", "question", "query", "problem", "input")
_ANSWERS = ("output", "answer", "response", "solution", "completion", "target")
"""Usual names of columns with a question and its answer."""
_OWN = frozenset({"prompt", "messages", "conversations", "text", "content", "label", "kto_tag"})
"""Columns of shapes that need neither."""
Lengths = Mapping[str, int | None]
_METHODS: dict[KnownFormat, str] = {
    "preference": "dpo",
    "labelled": "kto",
    "messages": "sft",
    "sharegpt": "sft",
    "alpaca": "sft",
    "prompt_completion": "sft",
    "prompt": "grpo",
    "text": "pretrain",
}
"""The method that learns from rows of a shape."""


@dataclass(frozen=True)
class RowsLook:
    """What the first rows show."""

    format: KnownFormat
    rows: int
    is_exact: bool
    """True if the rows are counted."""
    tokens: int
    """Tokens of all rows together, about."""
    lengths: Lengths
    """Tokens up to which a share of the texts goes, by the share: 0.5, 0.99, 1; None: more than the
    model takes."""
    is_measured: bool
    """True if the model's tokenizer measured the lengths, with its chat template."""
    lacks_template: bool = False
    """True if the rows are conversations and the tokenizer has no chat template."""
    fault: str = ""
    """Why the model's chat template cannot render a row, of the first such row; empty if it can."""
    unrendered: float = 0.0
    """Share of the first rows that it cannot render."""
    longer: float = 0.0
    """Share of the first rows that are left out, as they are longer than the model takes."""
    is_split: bool = False
    """True if a measured text is longer than the model takes: the lengths are those of pieces."""
    bad: int = 0
    """Of the first rows, those that cannot be used."""
    usable: int = 0
    """Of the first rows, those that can be used."""
    is_verbatim: bool = False
    """True if texts are read as they are, without the chat template."""

    @property
    def kept(self) -> float:
        """Rows that are neither left out nor impossible to render, about; all where none is left,
        as settings then have to change."""
        share = 1 - self.longer - self.unrendered
        return self.rows * (share if share > 0 else 1.0)

    @property
    def leaves_all_out(self) -> bool:
        """True if each of the first rows is longer than the model takes."""
        return self.longer == 1


def place_of_data(data: str) -> dict[str, Any]:
    """The source of a file, folder, URI, or data set of the hub.

    Raises:
        InputError: there is no such file.
    """
    if "://" in data:
        return {"path": data}
    with about(_OPTION):
        path = resolve_path(data, Path.cwd())
    if exists(path) or any(sign in data for sign in "*?["):
        return {"path": path}
    if _HUB.fullmatch(data) and not Path(data).suffix and not data.startswith("."):
        return {"dataset": data}
    raise InputError(f"{_OPTION}: {data}: there is no such file or folder; correct the path")


def method_of(place: dict[str, Any]) -> tuple[KnownFormat, str]:
    """The shape of the rows, and the method that learns from it.

    Args:
        place: the source, which gets the columns of rows that call a question or an answer
            otherwise.

    Raises:
        InputError: the file is empty, none of its rows can be read, or they have no shape that
            finray knows.
    """
    with about(_OPTION):
        files = expand(Source.model_validate(place)).files
        rows = list(islice(all_rows(files, UNCHANGED, _ROW_BYTES), _FIRST))
        good = [(where, row) for where, row in rows if not isinstance(row, BadRow)]
        bad = [(where, row) for where, row in rows if isinstance(row, BadRow)]
        if not good:
            where, reason = (bad[0][0], bad[0][1].reason) if bad else (files[0].place, "no rows")
            raise InputError(f"{where}: {reason}; none of the first rows can be read")
        if columns := _columns_of([row for _, row in good]):
            place["columns"] = columns
            has_pairs = any(row.get("chosen") is not None for _, row in good)
            shape: KnownFormat = "preference" if has_pairs else "alpaca"
        else:
            shape = detect_format(good, remedy=_RENAME)
        if shape == "prompt":
            try:
                refuse_steps(good[0][1])
            except RowError as error:
                raise InputError(f"{good[0][0]}: {error}") from None
    return shape, _METHODS[shape]


def _columns_of(rows: Sequence[Row]) -> dict[str, str]:
    """finray's names of a question's and an answer's columns; empty where rows have them, or none
    of the usual ones."""

    def usual(names: Sequence[str]) -> str | None:
        texts = {name: sum(_is_text(row.get(name)) for row in rows) for name in names}
        return next((name for name, count in texts.items() if 2 * count > len(rows)), None)

    present = {name for row in rows for name, value in row.items() if value is not None}
    question, answer = usual(_QUESTIONS), usual(_ANSWERS)
    if present & _OWN or question is None:
        return {}
    if {"chosen", "rejected"} <= present:
        return {} if question == "instruction" else {"instruction": question}
    if answer is None or (question, answer) == ("instruction", "output"):
        return {}
    columns = {"instruction": question, "output": answer}
    if "context" in present and "input" not in present:
        columns["input"] = "context"
    return {name: own for name, own in columns.items() if name != own}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def look_at_rows(recipe: Recipe, folder: Path | None) -> RowsLook:
    """Count and measure the rows of a recipe's only source.

    Args:
        recipe: a recipe with the method, and the greatest max_length that is possible.
        folder: the model's, if it is on this machine.

    Raises:
        InputError: none of the first rows is usable.
    """
    [source] = resolve_data(recipe).train
    size = sum(file.size for file in source.files)
    with about(_OPTION):
        inspected = inspect_source(
            source, recipe.method, recipe.data.max_row_bytes, size <= _COUNTED_BYTES
        )
    inspection = inspected.inspection
    texts = [sum(map(len, example.contents)) for example in inspected.examples]
    figures, lacks_template = None, False
    if folder is not None:
        try:
            figures = measure_sample(recipe)
        except InputError as error:
            if NO_TEMPLATE not in str(error):
                raise
            lacks_template = True
    lengths: Lengths = _quantiles([math.ceil(text / _CHARACTERS) for text in texts])
    of_row = sum(texts) / len(texts) / _CHARACTERS
    longer, unrendered, is_measured, is_split = 0.0, 0.0, False, False
    if figures is not None and figures.rows:
        longer, unrendered = figures.overlong / figures.rows, figures.unrendered / figures.rows
        if is_measured := bool(figures.lengths):
            lengths, of_row = figures.lengths, figures.tokens / figures.rows
        [first] = figures.train
        is_split = inspection.format == "text" and first.documents > first.rows
    return RowsLook(
        inspection.format,
        inspection.rows,
        inspection.is_exact,
        max(1, round(of_row * inspection.rows)),
        lengths,
        is_measured,
        lacks_template,
        "" if figures is None else figures.fault,
        unrendered,
        longer,
        is_split,
        len(inspected.bad),
        round(len(inspected.examples) / inspected.per_row),
        all(map(_is_verbatim, inspected.examples)),
    )


def _is_verbatim(example: Example) -> bool:
    if isinstance(example, PreferencePair):
        return isinstance(example.chosen, Completion)
    answer = example.answer if isinstance(example, LabelledExample) else example
    return isinstance(answer, Completion)


def _quantiles(sizes: list[int]) -> dict[str, int]:
    ordered = sorted(sizes)
    places: dict[str, Any] = {"0.5": 0.5, "0.9": 0.9, "0.99": 0.99, "1": 1.0}
    return {
        name: max(8, ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)])
        for name, share in places.items()
    }
