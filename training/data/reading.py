"""Reads the rows of a chunk, each with its line number; an unreadable row becomes a `BadRow`."""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..common.errors import InputError, reason
from ..common.formatting import one_line
from .contents import is_unchanged
from .json_array import array_rows, fault_of_json
from .json_features import decode_json
from .rows import (
    SHOWN,
    BadRow,
    Row,
    Unreadable,
    row_or_bad,
    shorten,
    shown,
    size_in_bytes,
    too_large,
)
from .sources import Chunk, SourceFile, arrow_batches, parquet_metadata, plan_chunks
from .struct_nulls import chat_columns, without_nulls

_BINARY = ("parquet", "arrow")
_NO_TEXT = (
    (b"\x1f\x8b", "data compressed by gzip (.gz)"),
    (b"\x28\xb5\x2f\xfd", "data compressed by zstd (.zst)"),
    (b"PK\x03\x04", "a zip archive or a workbook"),
    (b"PAR1\x15", "Parquet (.parquet)"),
    (b"ARROW1\0\0", "Arrow (.arrow)"),
)
"""How files of other kinds begin."""
_WIDE = (
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "UTF-32"),
    (re.compile(rb"(?:\xff\xfe|\xfe\xff).*", re.DOTALL), "UTF-16"),
    (re.compile(rb"[\t-~]\0\0\0"), "UTF-32LE"),
    (re.compile(rb"\0\0\0[\t-~]"), "UTF-32BE"),
    (re.compile(rb"[\t-~]\0[\t-~]\0"), "UTF-16LE"),
    (re.compile(rb"\0[\t-~]\0[\t-~]"), "UTF-16BE"),
)
"""How texts of two or four bytes a letter begin: with a mark, or with letters of ASCII."""
_BLOCK = 2**20
_READ_AHEAD = 8 * 2**20
"""Bytes of Parquet rows that are converted together."""
_MOST_TOGETHER = 512


@dataclass
class _Count:
    """Lines so far. Apart from what holds the rows, which would hold itself: a file whose rows are
    not all taken would stay open until garbage is collected."""

    lines: int = 0


@dataclass(frozen=True)
class ChunkContent:
    """The rows of a chunk, and its number of lines."""

    rows: Iterator[tuple[int, Row | BadRow]]
    """(line, row) pairs. Lines (or Parquet rows) are counted from 1 at the start of the chunk."""
    _count: _Count

    @property
    def lines(self) -> int:
        """Lines (or Parquet rows) in the chunk, once all rows are taken; 0 for a kind of file that
        is always one chunk."""
        return self._count.lines


def read_chunk(chunk: Chunk, max_bytes: int) -> ChunkContent:
    """Open a chunk and iterate over its rows.

    Args:
        chunk: the chunk.
        max_bytes: a larger row becomes a `BadRow`; of lines, no more is held in memory.

    Raises:
        InputError: while iterating, if a file cannot be read, or a JSON array, CSV, Parquet or
            compressed file is damaged: all rows after the damage are lost, so this is not a matter
            of single bad rows; after the last row, if the file changed in the meantime.
    """
    file = chunk.file
    count = _Count()
    if chunk.kind == "parquet":
        metadata = parquet_metadata(file)
        groups = range(chunk.start, chunk.stop)
        count.lines = sum(metadata.row_group(group).num_rows for group in groups)
        rows = _parquet_rows(chunk, max_bytes)
    elif chunk.kind == "arrow":
        rows = _arrow_rows(chunk, max_bytes, count)
    elif chunk.kind == "array":
        rows = array_rows(file, max_bytes)
    elif chunk.kind in ("csv", "tsv"):
        rows = _csv_rows(file, "," if chunk.kind == "csv" else "\t", max_bytes)
    else:
        lines = (
            _compressed_lines(file, max_bytes)
            if file.is_compressed
            else _lines_of(chunk, max_bytes, count)
        )
        rows = _line_rows(lines, _parse_text if chunk.kind == "text" else _parse_line)
    if chunk.rows is not None:
        rows = islice(rows, *chunk.rows)
    if chunk.start == 0 and chunk.kind not in _BINARY:
        rows = _in_utf8(file, rows)
    return ChunkContent(_guard(file, _unchanged(file, rows)), count)


def count_rows(file: SourceFile, at_most: int) -> int:
    """Number of rows in a file, or `at_most` if it has more; reads no further than there.

    Raises:
        InputError: the file cannot be read.
    """
    file = replace(file, rows=None)
    chunks = plan_chunks(file)
    if chunks and chunks[0].kind == "parquet":
        return min(at_most, int(parquet_metadata(file).num_rows))
    if chunks and chunks[0].kind == "arrow":
        return min(at_most, sum(int(batch.num_rows) for batch in arrow_batches(file)))
    count = 0
    for chunk in chunks:
        rows = read_chunk(chunk, _BLOCK).rows
        if chunk.kind in ("lines", "text") and not file.is_compressed:
            rows = _line_rows(_lines_of(chunk, _BLOCK, _Count()), _unparsed)
        count += sum(1 for _ in islice(rows, at_most - count))
        if count >= at_most:
            break
    return count


def first_line(chunk: Chunk) -> int:
    """Number of the chunk's first line (or Parquet row) in its file; reads the file up to there.

    Raises:
        InputError: the file cannot be read, or is shorter by now.
    """
    if chunk.start == 0:
        return 1
    if chunk.kind == "parquet":
        metadata = parquet_metadata(chunk.file)
        return 1 + sum(int(metadata.row_group(group).num_rows) for group in range(chunk.start))
    if chunk.kind == "arrow":
        batches = islice(arrow_batches(chunk.file), chunk.start)
        return 1 + sum(int(batch.num_rows) for batch in batches)
    line = 1
    with _guarded(chunk.file), chunk.file.open() as stream:
        remaining = _line_start(stream, chunk.start, chunk.file.size)
        stream.seek(0)
        while remaining > 0:
            if not (block := stream.read(min(_BLOCK, remaining))):
                raise _changed(chunk.file)
            line += block.count(b"\n")
            remaining -= len(block)
    return line


@contextmanager
def _guarded(file: SourceFile) -> Iterator[None]:
    """Turn errors of a source file into one message."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file.place}: the file is damaged or cannot be read: {reason(error)}; write it again"
        ) from None


def _in_utf8(
    file: SourceFile, rows: Iterator[tuple[int, Row | BadRow]]
) -> Iterator[tuple[int, Row | BadRow]]:
    """Refuse what is no text, or one of two or four bytes a letter: no row of it could be read."""
    with file.open_text() as stream:
        start = bytes(stream.read(8))
    if (what := next((name for magic, name in _NO_TEXT if start.startswith(magic)), "")) != "":
        raise InputError(
            f"{file.place}: the file holds {what}, not the text that its name says; rename or "
            "convert it"
        )
    wide = next((name for pattern, name in _WIDE if pattern.fullmatch(start[:4])), None)
    if wide is not None:
        raise InputError(
            f"{file.place}: the text is not UTF-8, but {wide}; convert it: iconv -f {wide} -t UTF-8"
        )
    yield from rows


def _guard(
    file: SourceFile, rows: Iterator[tuple[int, Row | BadRow]]
) -> Iterator[tuple[int, Row | BadRow]]:
    with _guarded(file):
        yield from rows


def _unchanged(
    file: SourceFile, rows: Iterator[tuple[int, Row | BadRow]]
) -> Iterator[tuple[int, Row | BadRow]]:
    yield from rows
    if not is_unchanged(file):
        raise _changed(file)


def _changed(file: SourceFile) -> InputError:
    return InputError(
        f"{file.place}: changed while it was read; restore it, or start again with what it "
        "holds now"
    )


def _lines_of(chunk: Chunk, max_bytes: int, count: _Count) -> Iterator[bytes | BadRow]:
    """The lines that begin in [start, stop); counts them in `count`."""
    with chunk.file.open() as stream:
        position = _line_start(stream, chunk.start, chunk.file.size)
        stream.seek(position)
        for size, line in _lines(stream, max_bytes):
            if position >= chunk.stop or position >= chunk.file.size:
                return
            position += size
            count.lines += 1
            yield line


def _compressed_lines(file: SourceFile, max_bytes: int) -> Iterator[bytes | BadRow]:
    with file.open_text() as stream:
        for _, line in _lines(stream, max_bytes):
            yield line


def _lines(stream: Any, max_bytes: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """(size with its end, line) of every line; of a line that is too large, only the start is kept.

    Args:
        stream: bytes.
        max_bytes: largest line.
    """
    parts: list[bytes] = []
    size = kept = 0
    while block := stream.read(_BLOCK):
        *ends, rest = block.split(b"\n")
        for end in ends:
            if kept <= max_bytes:
                parts.append(end)
            size += len(end) + 1
            yield size, _line(parts, size - 1, max_bytes)
            size = kept = 0
        size += len(rest)
        if kept <= max_bytes:
            parts.append(rest)
            kept += len(rest)
    if size:
        yield size, _line(parts, size, max_bytes)


def _line(parts: list[bytes], size: int, max_bytes: int) -> bytes | BadRow:
    """The line of some parts, which are removed from their list."""
    joined = b"".join(parts if size <= max_bytes else parts[:2])
    parts.clear()
    if size <= max_bytes:
        return joined
    start = joined[: 4 * SHOWN].decode("utf-8", "backslashreplace")
    return too_large(size, max_bytes, start)


def _line_start(stream: Any, position: int, size: int) -> int:
    """Byte position of the first line that begins at or after `position`."""
    if position == 0:
        return 0
    stream.seek(position - 1)
    position -= 1
    while position < size:
        block = stream.read(_BLOCK)
        if not block:
            break
        newline = block.find(b"\n")
        if newline >= 0:
            return int(position + newline + 1)
        position += len(block)
    return size


def _line_rows(
    lines: Iterator[bytes | BadRow], parse: Callable[[bytes], Row | BadRow]
) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of lines; blank ones are none."""
    for number, line in enumerate(lines, start=1):
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip().removeprefix(codecs.BOM_UTF8):
            yield number, parse(line.removeprefix(codecs.BOM_UTF8))


def _unparsed(_: bytes) -> Row:
    return {}


def _parse_text(line: bytes) -> Row | BadRow:
    """A line of plain text as a row."""
    text = _decoded(line.rstrip(b"\r"))
    return text if isinstance(text, BadRow) else {"text": text}


def _decoded(line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = shorten(line.decode("utf-8", "backslashreplace"))
        return BadRow(f"not UTF-8 text at byte {error.start + 1} of the line", shown)


def _parse_line(line: bytes) -> Row | BadRow:
    text = _decoded(line.strip().removeprefix(codecs.BOM_UTF8))
    if isinstance(text, BadRow):
        return text
    try:
        row = json.loads(text)
    except (RecursionError, ValueError) as error:
        return BadRow(fault_of_json(error), shorten(text))
    return row_or_bad(row, text)


def _csv_rows(
    file: SourceFile, delimiter: str, max_bytes: int
) -> Iterator[tuple[int, Row | BadRow]]:
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is too small for long documents
    with file.open_text() as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(
                    f"{file.place}:{line}: not valid CSV: {reason(error)}; correct it"
                ) from None
            if header is None:
                header = _checked_header(file, cells, delimiter) if cells else None
            elif cells:
                yield line, _csv_row(header, cells, max_bytes)


def _checked_header(file: SourceFile, names: list[str], delimiter: str) -> list[str]:
    """The columns' names.

    Raises:
        InputError: one stands twice, or another character separates the columns.
    """
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), "")
    if twice:
        raise InputError(
            f"{file.place}:1: the header has two columns {shown(twice)}, of which one would be "
            "lost; rename one"
        )
    other = next((mark for mark in ",;\t|" if mark != delimiter and mark in names[0]), "")
    if len(names) == 1 and other:
        raise InputError(
            f"{file.place}:1: the header is the single column {shown(names[0])}; columns are "
            "separated by commas in .csv and by tabs in .tsv: write it so"
        )
    return names


def _csv_row(header: list[str], cells: list[str], max_bytes: int) -> Row | BadRow:
    size = sum(map(size_in_bytes, cells))
    if size > max_bytes:
        return too_large(size, max_bytes, _shown(cells))
    if not all(map(_is_utf8, cells)):
        return BadRow("not UTF-8 text", shorten(_shown(cells)))
    if len(cells) != len(header):
        reason = f"{len(cells)} cells, but the header has {len(header)}"
        return BadRow(reason, shorten(_shown(cells)))
    return dict(zip(header, cells, strict=True))


def _is_utf8(text: str) -> bool:
    """False if a byte of the text was not UTF-8, and is a lone surrogate now."""
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _shown(cells: list[str]) -> str:
    joined = " | ".join(cell[: 2 * SHOWN] for cell in cells[: 2 * SHOWN])
    return joined.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parquet_rows(chunk: Chunk, max_bytes: int) -> Iterator[tuple[int, Row | BadRow]]:
    number = 0
    with chunk.file.open() as stream:
        parquet = pq.ParquetFile(stream)
        for group in range(chunk.start, chunk.stop):
            metadata = parquet.metadata.row_group(group)
            mean = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
            together = max(1, min(_MOST_TOGETHER, _READ_AHEAD // mean))
            for batch in parquet.iter_batches(batch_size=together, row_groups=[group]):
                for row in decode_json(parquet.schema_arrow, _converted(batch, max_bytes)):
                    number += 1
                    yield number, row


def _arrow_rows(chunk: Chunk, max_bytes: int, count: _Count) -> Iterator[tuple[int, Row | BadRow]]:
    """The rows of record batches [start, stop); counts all of them in `count`."""
    for batch in islice(arrow_batches(chunk.file), chunk.start, chunk.stop):
        first = count.lines + 1
        count.lines += batch.num_rows
        together = max(1, min(_MOST_TOGETHER, _READ_AHEAD * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, together):
            rows = _converted(batch.slice(start, together), max_bytes)
            rows = decode_json(batch.schema, rows)
            yield from enumerate(rows, first + start)


def _converted(batch: Any, max_bytes: int) -> list[Row | BadRow]:
    """The rows of a record batch; messages and tools lack the keys that are null."""
    rows = _as_python(batch, max_bytes)
    columns = chat_columns(batch.schema)
    for row in rows if columns else ():
        if isinstance(row, dict):
            row.update({name: without_nulls(row[name]) for name in columns})
    return rows


def _as_python(batch: Any, max_bytes: int) -> list[Row | BadRow]:
    if batch.nbytes <= max_bytes:
        try:
            return list(batch.to_pylist())
        except (ValueError, OverflowError):  # a value that Python cannot hold: which row has it?
            return [_converted_row(batch.slice(n, 1), max_bytes) for n in range(batch.num_rows)]
    return [_converted_row(batch.slice(n, 1), max_bytes) for n in range(batch.num_rows)]


def _converted_row(row: Any, max_bytes: int) -> Row | BadRow:
    size = row.nbytes
    # The dictionary of a column is not part of each row.
    if size > max_bytes and not any(map(pa.types.is_dictionary, row.schema.types)):
        return too_large(size, max_bytes, ", ".join(row.schema.names))
    names = row.schema.names
    return {name: _value(column) for name, column in zip(names, row.columns, strict=True)}


def _value(column: Any) -> Any:
    """The only value of a column; a method may have no use for one that cannot be read."""
    try:
        return column[0].as_py()
    except (ValueError, OverflowError) as error:
        return Unreadable(one_line(str(error)))
