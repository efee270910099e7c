"""A quick check of the first rows of a source: its format, its size, and whether it is usable."""

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
    """Total size as stored, before decompression."""
    format: KnownFormat
    rows: int
    is_exact: bool
    """True if `rows` is counted; otherwise it is estimated from the first rows."""
    tokens: int | None
    """Estimate for all rows, without special tokens; None if there is no tokenizer.json."""


@dataclass(frozen=True)
class InspectedRows:
    """The inspection of a source, and the examples in its first usable rows."""

    inspection: SourceInspection
    examples: tuple[Example, ...]
    """In the shape that the method tokenises."""
    per_row: float
    """Mean number of examples in a usable row of the source."""


def inspect_source(
    source: ResolvedSource, method: str, count_all: bool, tokenizer: Any
) -> InspectedRows:
    """Read the first rows of a source, and convert them as the method does.

    Args:
        source: the files and the format of the rows.
        method: the method's kind.
        count_all: read all rows to count them; otherwise their number is estimated.
        tokenizer: a `tokenizers.Tokenizer` to estimate the number of tokens, or None.

    Raises:
        InputError: none of the first rows is usable.
    """
    rows = all_rows(source.files)
    first = list(islice(rows, _ROWS_CHECKED))
    usable = _usable(source, method, first)
    is_parquet = [file_kind(file) == "parquet" for file in source.files]
    if all(is_parquet):
        count, is_exact = sum(parquet_metadata(file).num_rows for file in source.files), True
    elif count_all:
        count, is_exact = len(first) + sum(1 for _ in rows), True
    else:
        count, is_exact = _estimated_rows(source, first), False
    examples = tuple(example for row in usable for example in row)
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
    """The examples of each usable row; an InputError if no row is usable."""
    rules = rules_of(method)
    usable: list[tuple[Example, ...]] = []
    first_error = ""
    for place, row in first:
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            examples = examples_of(normalise(row, source.format), method)
            usable.append(tuple(rules.adapt(example) for example in examples))
        except RowError as error:
            first_error = first_error or f"{place}: {error}"
    if not usable:
        raise InputError(
            f"{first_error}; none of the first {len(first)} rows is usable as {source.format}"
        )
    return usable


def _estimated_rows(source: ResolvedSource, first: Sequence[tuple[str, Row | BadRow]]) -> int:
    texts = [
        row.raw if isinstance(row, BadRow) else json.dumps(row, default=str) for _, row in first
    ]
    mean = (sum(map(len, texts)) + 1) / len(texts)
    size = sum(
        file.size * (_TYPICAL_COMPRESSION if file.is_compressed else 1.0) for file in source.files
    )
    return max(1, round(size / mean))


def _mean_tokens(tokenizer: Any, rows: Iterable[Example]) -> float:
    encodings = tokenizer.encode_batch(["\n".join(row.contents) for row in rows])
    return sum(len(encoding.ids) for encoding in encodings) / len(encodings)
