"""A quick check of the first rows of a source: its format, its size, and whether it is usable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.errors import InputError
from ..config.method_facts import MethodSettings
from ..config.source import KnownFormat
from .formats import detect_format, read_examples
from .resolve import ResolvedSource, all_rows, without_rows
from .rows import BadRow, Row
from .shapes import Example, RowError
from .sources import file_kind, parquet_metadata

_ROWS_CHECKED = 200
_TEXT_CHECKED = 64 * 2**20
"""Characters of JSON in the first rows, which are held in memory together."""
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
    unread_splits: tuple[str, ...] = ()
    """Splits of the folder or data set that no source reads."""


@dataclass(frozen=True)
class InspectedRows:
    """The inspection of a source, and the examples in its first usable rows."""

    inspection: SourceInspection
    examples: tuple[Example, ...]
    """The rows in the shape that the method tokenises."""
    per_row: float
    """Mean number of examples in a usable row of the source."""
    bad: tuple[str, ...]
    """Place and fault of the first rows that cannot be used."""


def inspect_source(
    source: ResolvedSource,
    method: MethodSettings,
    max_row_bytes: int,
    count_all: bool,
) -> InspectedRows:
    """Read the first rows of a source, and convert them as the method does.

    Args:
        source: the files and the format of the rows.
        method: the method's settings.
        max_row_bytes: size of the largest row that is used.
        count_all: read all rows to count them; otherwise their number is estimated.

    Raises:
        InputError: there are no rows, or none of the first ones is usable.
    """
    rows = all_rows(source.files, source.changes, max_row_bytes)
    first, mean = _first(rows)
    if not first:
        raise without_rows(source.files, source.changes)
    usable, bad = _usable(source, method, first)
    is_parquet = [file_kind(file) == "parquet" for file in source.files]
    if all(is_parquet):
        count, is_exact = sum(parquet_metadata(file).num_rows for file in source.files), True
    elif count_all:
        count, is_exact = len(first) + sum(1 for _ in rows), True
    else:
        count, is_exact = _estimated_rows(source, mean), False
    examples = tuple(example for row in usable for example in row)
    per_row = len(examples) / len(usable)
    inspection = SourceInspection(
        path=source.path,
        files=len(source.files),
        bytes=sum(file.size for file in source.files),
        format=source.format,
        rows=count,
        is_exact=is_exact,
        unread_splits=source.unread_splits,
    )
    return InspectedRows(inspection, examples, per_row, bad)


def _first(
    rows: Iterator[tuple[str, Row | BadRow]],
) -> tuple[list[tuple[str, Row | BadRow]], float]:
    """The first rows, perhaps none, and the mean length of their text."""
    first: list[tuple[str, Row | BadRow]] = []
    size = 0
    for place, row in rows:
        first.append((place, row))
        size += _text_length(row)
        if len(first) == _ROWS_CHECKED or size > _TEXT_CHECKED:
            break
    return first, (size + 1) / max(1, len(first))


def _text_length(row: Row | BadRow) -> int:
    try:
        return len(row.raw if isinstance(row, BadRow) else json.dumps(row, default=str))
    except RecursionError:
        return 0


def _other_format(
    source: ResolvedSource, method: MethodSettings, first: Sequence[tuple[str, Row | BadRow]]
) -> str | None:
    """The fault of the first row, if the rows look like those of another method."""
    rows = [(place, row) for place, row in first if not isinstance(row, BadRow)]
    likely = detect_format(rows) if rows else source.format
    if likely == source.format:
        return None
    place, row = rows[0]
    try:
        read_examples(row, likely, method.kind, method.columns)
    except RowError as error:
        return f"{place}: {error}"
    return None


def _usable(
    source: ResolvedSource, method: MethodSettings, first: Sequence[tuple[str, Row | BadRow]]
) -> tuple[list[tuple[Example, ...]], tuple[str, ...]]:
    """The examples of each usable row, and the faults of the others; an InputError if no row is
    usable."""
    usable: list[tuple[Example, ...]] = []
    bad: list[str] = []
    for place, row in first:
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            _, examples = read_examples(row, source.format, method.kind, method.columns)
            usable.append(tuple(example for example, _ in examples))
        except RowError as error:
            bad.append(f"{place}: {error}")
    if not usable:
        fault = _other_format(source, method, first) or bad[0]
        raise InputError(
            f"{fault}; none of the first {len(first)} rows is usable as {source.format}"
        )
    return usable, tuple(bad)


def _estimated_rows(source: ResolvedSource, mean: float) -> int:
    size = sum(
        file.size * (_TYPICAL_COMPRESSION if file.is_compressed else 1.0) for file in source.files
    )
    return max(1, round(size / mean))
