"""The first pass over the data: turns chunks of source files into files of tokens."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.source import KnownFormat
from .chat import UnstableTemplate
from .curation.files import StageRows, held_in
from .curation.funnel import BAD_ROW, LEFT_OUT
from .examples import asked_of
from .formats import read_examples
from .prepared import REPEATED
from .reading import first_line, read_chunk
from .render_settings import RenderSettings
from .rendering import Document, Prompt, Rendered, Renderer, load_renderer
from .row_changes import UNCHANGED, RowChanges, change_rows
from .row_facts import count_fields, digest, unused_fields
from .rows import BadRow, Row, excerpt
from .shapes import Example, RowError, share_of
from .sources import Chunk

TOKENS = "tokens"
"""Folder of the token files, inside an attempt."""
BY_WEIGHT = "by_weight"
"""Why a row is not used: its source's weight takes a share of the rows."""
BAD_ROWS_RETURNED = 1000
SAMPLES_KEPT = 1000

# Limits of the rows rendered in one call: enough for the tokenizer's threads, and little enough
# that its encodings (a few hundred bytes per token) need a small part of the memory.
_SLICE_CHARACTERS = 500_000
_SLICE_ROWS = 1024
_GROUP_TOKENS = 500_000
"""Tokens of a row group, the unit of the second pass; a long text has several."""

_TOKEN_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("trainable", pa.list_(pa.bool_())),
        ("extra", pa.string()),
    ]
)


@dataclass(frozen=True)
class CuratedChunk:
    """The rows of a chunk that went through stages."""

    rows: StageRows
    held: Folder | None
    """The stage that says of each row whether it is held out."""
    read: int
    """Number of rows in the chunk, as it is read."""
    lines: int
    """Number of lines."""


@dataclass(frozen=True)
class ChunkItem:
    """Input of one task of the first pass."""

    number: int
    chunk: Chunk
    format: KnownFormat
    split: str
    """train or eval."""
    weight: float
    changes: RowChanges = UNCHANGED
    curated: CuratedChunk | None = None
    """Where its rows are, if they went through stages."""


@dataclass(frozen=True)
class TokenGroup:
    """A row group of a token file."""

    file: str
    """Relative to the attempt's folder."""
    group: int
    tokens: int


@dataclass(frozen=True)
class Quarantined:
    """A row that cannot be used."""

    line: int
    """Counted from 1 at the chunk's first line."""
    reason: str
    raw: str


@dataclass
class ChunkResult:
    """Result of one task of the first pass."""

    item: ChunkItem
    lines: int
    """Number of lines in the chunk, to number the lines of the next chunk."""
    histogram: NDArray[np.int64]
    """Number of documents by length, for the bins of `length_edges`."""
    rows: int = 0
    bad_rows: list[Quarantined] = field(default_factory=list)
    """The first bad rows; `dropped` counts all of them."""
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    """Rows with a field that nothing uses, by its name."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of documents' texts by their length in tokens."""
    digests: NDArray[np.uint64] | None = None
    """Of each usable row, where rows of two splits are compared."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents by split, copies included."""
    groups: dict[str, list[TokenGroup]] = field(default_factory=lambda: {"train": [], "eval": []})
    samples: list[tuple[int, Prompt]] = field(default_factory=list)
    """(row number within the chunk, prompt) pairs."""


@dataclass(frozen=True)
class _Pending:
    """A usable row that waits to be rendered."""

    index: int
    line: int
    split: str
    copies: int
    row: Row
    normalised: Example
    """The row in the shape that the method tokenises."""
    extra: Row | None
    """Further input of the method."""


def length_edges(max_length: int) -> NDArray[np.int64]:
    """Edges of the length histogram's bins, from 0 to max_length tokens."""
    return np.unique(np.linspace(0, max_length, 33).astype(np.int64))


@dataclass(frozen=True)
class TokeniseTask:
    """Reads, normalises, renders and tokenises a chunk, and writes its documents."""

    render: RenderSettings
    method: str
    """The method's kind."""
    columns: tuple[str, ...]
    """The `columns` of the method's settings."""
    attempt: Folder
    holdout: float
    """Share of the training rows that are moved to the evaluation split."""
    max_row_bytes: int
    """Size of the largest row that is used."""
    with_samples: bool
    """Collect prompts of the evaluation split."""
    with_digests: bool = False
    """Collect the digest of each row."""

    def __call__(self, item: ChunkItem) -> ChunkResult:
        edges = length_edges(self.render.max_length)
        result = ChunkResult(item, 0, np.zeros(len(edges) - 1, np.int64))
        renderer = load_renderer(self.render)
        writers = {
            split: TokenFile(self.attempt, f"{TOKENS}/{split}-{item.number:06d}.parquet")
            for split in ("train", "eval")
        }
        digests: list[int] = []
        try:
            for pending in _slices(self._usable(item, result, digests, renderer.reads)):
                self._render(renderer, pending, result, writers)
        finally:
            for writer in writers.values():
                writer.close()
        result.digests = np.array(digests, np.uint64)
        for split, writer in writers.items():
            result.groups[split] = writer.groups
        return result

    def _usable(
        self,
        item: ChunkItem,
        result: ChunkResult,
        digests: list[int],
        reads: Callable[[str], bool],
    ) -> Iterable[_Pending]:
        held = _held(item)
        for index, line, row in self._rows(item, result):
            if isinstance(row, BadRow):
                _quarantine(result, line, row.reason, row.raw)
                continue
            try:
                normalised, examples = read_examples(row, item.format, self.method, self.columns)
            except RowError as error:
                _quarantine(result, line, str(error), excerpt(row))
                continue
            count_fields(
                result.unused, unused_fields(row, item.format, self.method, self.columns, reads)
            )
            if self.with_digests:
                digests.append(digest(normalised))
            if held is None:
                held_out = self.holdout > 0 and share_of(normalised, "holdout") < self.holdout
            else:
                held_out = held[index]
            split = "eval" if held_out else item.split
            copies = _copies(normalised, item.weight)
            if copies == 0:
                result.dropped[BY_WEIGHT] += 1
                continue
            for example, extra in examples:
                yield _Pending(index, line, split, copies, row, example, extra)

    def _rows(
        self, item: ChunkItem, result: ChunkResult
    ) -> Iterator[tuple[int, int, Row | BadRow]]:
        """(number in the chunk, line, row) of each row that is not left out; counts all of them."""
        if item.curated is not None:
            result.rows, result.lines = item.curated.read, item.curated.lines
            for stored in item.curated.rows:
                yield stored.index, stored.line, stored.row
            return
        content = read_chunk(item.chunk, self.max_row_bytes)
        for index, (line, row) in enumerate(change_rows(content.rows, item.changes)):
            result.rows += 1
            if row is None:
                result.dropped[LEFT_OUT] += 1
                continue
            yield index, line, row
        result.lines = content.lines

    def _render(
        self,
        renderer: Renderer,
        rows: list[_Pending],
        result: ChunkResult,
        writers: dict[str, "TokenFile"],
    ) -> None:
        rendered = renderer.render([row.normalised for row in rows])
        for row, outcome in zip(rows, rendered, strict=True):
            if outcome.error is not None:
                _record_error(result, row, outcome.error)
                continue
            if outcome.dropped is not None:
                result.dropped[outcome.dropped] += 1
            result.notes.update(outcome.notes)
            if outcome.repeated:
                result.notes[REPEATED] += outcome.repeated
            extra = _encoded(row.extra, outcome.cut)
            result.documents[row.split] += row.copies * len(outcome.documents)
            for document in outcome.documents:
                for _ in range(row.copies):
                    writers[row.split].add(row.index, document, extra)
            self._sample(renderer, row, outcome, result)
        lengths = [
            size
            for outcome in rendered
            for document in outcome.documents
            for size in document.lengths
        ]
        result.histogram += np.histogram(lengths, length_edges(self.render.max_length))[0]
        result.lengths.update(lengths)
        for writer in writers.values():
            writer.flush()

    def _sample(
        self, renderer: Renderer, row: _Pending, outcome: Rendered, result: ChunkResult
    ) -> None:
        is_held_out = row.split == "eval" and len(outcome.documents) > 0
        if self.with_samples and is_held_out and len(result.samples) < SAMPLES_KEPT:
            prompt = renderer.prompt(row.normalised)
            if prompt is not None:
                asked = json.dumps(asked_of(row.row, row.normalised), default=str)
                result.samples.append((row.index, replace(prompt, asked=asked)))


class TokenFile:
    """A Parquet file of documents; created when the first document is written."""

    def __init__(self, attempt: Folder, name: str) -> None:
        self._attempt = attempt
        self._name = name
        self._writer: Any = None
        self._rows: list[int] = []
        self._documents: list[Document] = []
        self._extras: list[str | None] = []
        self._tokens = 0
        self.groups: list[TokenGroup] = []

    def add(self, row: int, document: Document, extra: str | None) -> None:
        """Buffer a document until the next flush; many tokens are written at once.

        Args:
            row: number of its row within the chunk.
            document: tokens of the row.
            extra: further input of the method from this row, as JSON.
        """
        self._rows.append(row)
        self._documents.append(document)
        self._extras.append(extra)
        self._tokens += len(document.input_ids)
        if self._tokens >= _GROUP_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered documents as one row group."""
        if not self._documents:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._attempt.file(self._name),
                _TOKEN_SCHEMA,
                filesystem=self._attempt.filesystem,
                compression="zstd",
                use_dictionary=False,
                write_statistics=False,
            )
        lengths = [len(document.input_ids) for document in self._documents]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        ids = np.concatenate([document.input_ids for document in self._documents])
        trainable = np.concatenate([document.trainable for document in self._documents])
        columns = [
            pa.array(self._rows, pa.int64()),
            pa.ListArray.from_arrays(offsets, ids),
            pa.array([document.lengths for document in self._documents], pa.list_(pa.int32())),
            pa.ListArray.from_arrays(offsets, trainable),
            pa.array(self._extras, pa.string()),
        ]
        self._writer.write_table(pa.table(columns, schema=_TOKEN_SCHEMA))
        group = TokenGroup(self._name, len(self.groups), len(ids))
        self.groups.append(group)
        self._rows, self._documents, self._extras, self._tokens = [], [], [], 0

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _slices(pending: Iterable[_Pending]) -> Iterable[list[_Pending]]:
    """Group rows into lists that the tokenizer renders in one call."""
    part: list[_Pending] = []
    size = 0
    for row in pending:
        part.append(row)
        size += sum(map(len, row.normalised.contents))
        if size >= _SLICE_CHARACTERS or len(part) >= _SLICE_ROWS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _held(item: ChunkItem) -> dict[int, bool] | None:
    """Of each row, whether a stage holds it out; None if none decides that."""
    if item.curated is None or item.curated.held is None:
        return None
    return held_in(item.curated.held, item.curated.rows.chunk)


def _copies(row: Example, weight: float) -> int:
    """Number of copies of a row: the weight's whole part, plus one for a share of the rows that
    equals its fraction."""
    whole = int(weight)
    fraction = weight - whole
    return whole + (1 if fraction > 0 and share_of(row, "weight") < fraction else 0)


def _quarantine(result: ChunkResult, line: int, reason: str, raw: str) -> None:
    result.dropped[BAD_ROW] += 1
    if len(result.bad_rows) < BAD_ROWS_RETURNED:
        result.bad_rows.append(Quarantined(line, reason, raw))


def _record_error(result: ChunkResult, row: _Pending, error: RowError) -> None:
    """Quarantine a row; an unstable chat template is an InputError, as it affects all rows."""
    if isinstance(error, UnstableTemplate):
        chunk = result.item.chunk
        line = first_line(chunk) - 1 + row.line
        raise InputError(f"{chunk.file.place}:{line}: {error}")
    _quarantine(result, row.line, str(error), excerpt(row.row))


def _encoded(extra: Row | None, cut: str) -> str | None:
    """The JSON that is stored with a document; `cut` is kept for the texts of online methods."""
    return None if extra is None else json.dumps({**extra, "cut": cut} if cut else extra)
