"""A quick look at the first rows of a source: its format, its size, and whether it is usable."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..common.errors import InputError
from .examples import examples_of, rules_of
from .formats import KnownFormat, normalise
from .reading import BadRow, Row
from .resolve import ResolvedSource, all_rows
from .shapes import Example, RowError
from .sources import file_kind, parquet_metadata

_ROWS_CHECKED = 200
_TYPICAL_COMPRESSION = 3.0


@dataclass(frozen=True)
class SourceInspection:
    """Files, rows and size of a source."""

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
class InspectedRows:
    """A source, and the examples in its first usable rows."""

    inspection: SourceInspection
    examples: tuple[Example, ...]
    """As the method tokenises them."""
    per_row: float
    """Mean number of examples in a usable row of the source."""


def inspect_source(
    source: ResolvedSource, method: str, counted: bool, tokenizer: Any
) -> InspectedRows:
    """Read the first rows of a source as a method learns from them.

    Args:
        source: where the rows are, and in which format.
        method: the method's kind.
        counted: whether to read on and count the rows; otherwise their number is estimated.
        tokenizer: a `tokenizers.Tokenizer` to estimate tokens with, or None.

    Raises:
        InputError: where none of the first rows is usable.
    """
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
    return InspectedRows(inspection, examples, per_row)


def _usable(
    source: ResolvedSource, method: str, first: Sequence[tuple[str, Row | BadRow]]
) -> list[tuple[Example, ...]]:
    """What each usable row gives; an InputError where none is usable."""
    rules = rules_of(method)
    usable: list[tuple[Example, ...]] = []
    fault = ""
    for place, row in first:
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            examples = examples_of(normalise(row, source.format), method)
            usable.append(tuple(rules.adapt(example) for example in examples))
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


def _mean_tokens(tokenizer: Any, rows: Iterable[Example]) -> float:
    encodings = tokenizer.encode_batch(["\n".join(row.contents) for row in rows])
    return sum(len(encoding.ids) for encoding in encodings) / len(encodings)
