"""Reads the rows of a chunk, each with its line number; an unreadable row becomes a `BadRow`."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..common.errors import InputError
from .sources import Chunk, SourceFile, parquet_metadata

_BLOCK = 2**20
_LARGEST_ELEMENT = 64 * 2**20
_SHOWN = 300

Row = dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    reason: str
    raw: str
    """The row as it is in the file, shortened."""


@dataclass(frozen=True)
class ChunkContent:
    """The rows of a chunk, and its number of lines."""

    rows: Iterator[tuple[int, Row | BadRow]]
    """(line, row) pairs. Lines (or Parquet rows) are counted from 1 at the start of the chunk."""
    lines: int
    """Lines (or Parquet rows) in the chunk; 0 for a kind of file that is always one chunk."""


def read_chunk(chunk: Chunk) -> ChunkContent:
    """Open a chunk and iterate over its rows.

    Raises:
        InputError: while iterating, if a JSON array, CSV, Parquet or compressed file is damaged:
            all rows after the damage are lost, so this is not a matter of single bad rows.
    """
    if chunk.kind == "parquet":
        metadata = parquet_metadata(chunk.file)
        groups = range(chunk.start, chunk.stop)
        count = sum(metadata.row_group(group).num_rows for group in groups)
        return ChunkContent(_parquet_rows(chunk), count)
    if chunk.kind == "array":
        return ChunkContent(_guard(chunk.file, _array_rows(chunk.file)), 0)
    if chunk.kind in ("csv", "tsv"):
        delimiter = "," if chunk.kind == "csv" else "\t"
        return ChunkContent(_guard(chunk.file, _csv_rows(chunk.file, delimiter)), 0)
    if chunk.file.is_compressed:
        return ChunkContent(_guard(chunk.file, _line_rows(_stream_lines(chunk.file))), 0)
    content = _line_range(chunk)
    lines = content.count(b"\n") + (0 if content.endswith(b"\n") or not content else 1)
    return ChunkContent(_line_rows(io.BytesIO(content)), lines)


def first_line(chunk: Chunk) -> int:
    """Number of the chunk's first line (or Parquet row) in its file; reads the file up to there."""
    if chunk.start == 0:
        return 1
    if chunk.kind == "parquet":
        metadata = parquet_metadata(chunk.file)
        return 1 + sum(int(metadata.row_group(group).num_rows) for group in range(chunk.start))
    line = 1
    with chunk.file.open() as stream:
        remaining = _line_start(stream, chunk.start, chunk.file.size)
        stream.seek(0)
        while remaining > 0:
            block = stream.read(min(_BLOCK, remaining))
            line += block.count(b"\n")
            remaining -= len(block)
    return line


def shorten(text: str) -> str:
    """Shorten a row's text to a few hundred characters, for messages and the quarantine."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _guard(
    file: SourceFile, rows: Iterator[tuple[int, Row | BadRow]]
) -> Iterator[tuple[int, Row | BadRow]]:
    try:
        yield from rows
    except OSError as error:
        raise InputError(f"{file.uri}: the file is damaged or cannot be read: {error}") from None


def _line_range(chunk: Chunk) -> bytes:
    """The lines that begin in [start, stop)."""
    with chunk.file.open() as stream:
        start = _line_start(stream, chunk.start, chunk.file.size)
        stop = _line_start(stream, chunk.stop, chunk.file.size)
        stream.seek(start)
        return bytes(stream.read(stop - start))


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


def _stream_lines(file: SourceFile) -> Iterator[bytes]:
    with file.open_text() as stream:
        rest = b""
        while block := stream.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        yield rest


def _line_rows(lines: Iterator[bytes] | io.BytesIO) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in enumerate(lines, start=1):
        text = line.strip().removeprefix(codecs.BOM_UTF8)
        if text:
            yield number, _parse_line(text)


def _parse_line(line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = shorten(line.decode("utf-8", "backslashreplace"))
        return BadRow(f"not UTF-8 text at byte {error.start + 1} of the line", shown)
    try:
        row = json.loads(text)
    except RecursionError:
        return BadRow("not usable JSON: nested too deeply", shorten(text))
    except ValueError as error:
        return BadRow(f"not valid JSON: {error}", shorten(text))
    return _object_or_bad(row, text)


def _object_or_bad(row: Any, text: str) -> Row | BadRow:
    if isinstance(row, dict):
        return row
    return BadRow(f"expected a JSON object, found {type(row).__name__}", shorten(text))


def _array_rows(file: SourceFile) -> Iterator[tuple[int, Row | BadRow]]:
    """The elements of a JSON array, decoded from a sliding window over its text."""
    with file.open_text() as stream:
        yield from _elements(_Window(file, stream))


def _elements(window: "_Window") -> Iterator[tuple[int, Row | BadRow]]:
    window.skip_space()
    window.expect("[")
    window.skip_space()
    if window.peek() == "]":
        return
    while True:
        window.skip_space()
        line, text, row = window.element()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield line, BadRow("not UTF-8 text", shorten(shown))
        else:
            yield line, _object_or_bad(row, text)
        window.skip_space()
        if window.peek() == "]":
            return
        window.expect(",")


class _Window:
    """A sliding window over a text file, with a position and its line number."""

    def __init__(self, file: SourceFile, stream: Any) -> None:
        self._file = file
        self._stream = stream
        # Invalid UTF-8 becomes lone surrogates here, so that only the row with them is bad.
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._json = json.JSONDecoder()
        self._text = ""
        self._position = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """The next character; empty at the end of the file."""
        while self._position >= len(self._text) and not self._ended:
            self._read_more()
        return self._text[self._position : self._position + 1]

    def skip_space(self) -> None:
        while (character := self.peek()) and character in " \t\r\n":
            self._line += character == "\n"
            self._position += 1

    def expect(self, character: str) -> None:
        actual = self.peek()
        if actual != character:
            self._fail(f"expected '{character}', found {actual!r}" if actual else "the file ends")
        self._position += 1

    def element(self) -> tuple[int, str, Any]:
        """Read the next element; returns (line, text, value)."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except RecursionError:
                self._fail("nested too deeply")
            except ValueError as error:
                if self._ended or len(self._text) - self._position > _LARGEST_ELEMENT:
                    self._fail(str(error))
                self._read_more()
            else:
                line, text = self._line, self._text[self._position : end]
                self._line += text.count("\n")
                self._position = end
                return line, text, value

    def _read_more(self) -> None:
        """Drop the text before the position, and double the rest (by at least a block)."""
        self._text = self._text[self._position :]
        self._position = 0
        block = self._stream.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        self._text += self._utf8.decode(block, final=self._ended)

    def _fail(self, reason: str) -> None:
        raise InputError(
            f"{self._file.uri}:{self._line}: the JSON array is invalid from here on: {reason}; "
            "repair it, or write one object per line as .jsonl"
        )


def _csv_rows(file: SourceFile, delimiter: str) -> Iterator[tuple[int, Row | BadRow]]:
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
                raise InputError(f"{file.uri}:{line}: not valid CSV: {error}") from None
            if header is None:
                header = cells
            elif cells:
                yield line, _csv_row(header, cells)


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    shown = " | ".join(cells)
    try:
        shown.encode("utf-8")
    except UnicodeEncodeError:
        raw = shown.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return BadRow("not UTF-8 text", shorten(raw))
    if len(cells) != len(header):
        reason = f"{len(cells)} cells, but the header has {len(header)}"
        return BadRow(reason, shorten(shown))
    return dict(zip(header, cells, strict=True))


def _parquet_rows(chunk: Chunk) -> Iterator[tuple[int, Row | BadRow]]:
    groups = list(range(chunk.start, chunk.stop))
    number = 0
    try:
        with chunk.file.open() as stream:
            parquet = pq.ParquetFile(stream)
            for batch in parquet.iter_batches(batch_size=512, row_groups=groups):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{chunk.file.uri}: the Parquet file is damaged: {error}") from None
