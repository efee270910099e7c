"""The first pass over the data: turns chunks of source files into files of tokens."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.errors import InputError
from ..common.storage import Folder
from .chat import UnstableTemplate
from .examples import ExampleRules, examples_of, rules_of
from .formats import KnownFormat, normalise
from .reading import BadRow, Row, first_line, read_chunk, shorten
from .rendering import Document, Prompt, Rendered, Renderer, RenderSettings, load_renderer
from .shapes import Example, RowError, share_of
from .sources import Chunk

BAD_ROW = "bad_row"
TOKENS = "tokens"
"""Folder of the token files, inside an attempt."""
BAD_ROWS_RETURNED = 1000
SAMPLES_KEPT = 1000

# Limits of the rows rendered in one call: enough for the tokenizer's threads, and little enough
# that its encodings (a few hundred bytes per token) need a small part of the memory.
_SLICE_CHARACTERS = 500_000
_SLICE_ROWS = 1024

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
class ChunkItem:
    """Input of one task of the first pass."""

    number: int
    chunk: Chunk
    format: KnownFormat
    split: str
    """train or eval."""
    weight: float


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
    """In the shape that the method tokenises."""
    extra: str | None


def length_edges(max_length: int) -> NDArray[np.int64]:
    """Edges of the length histogram's bins, from 0 to max_length tokens."""
    return np.unique(np.linspace(0, max_length, 33).astype(np.int64))


@dataclass(frozen=True)
class TokeniseTask:
    """Reads, normalises, renders and tokenises a chunk, and writes its documents."""

    render: RenderSettings
    method: str
    """The method's kind."""
    attempt: Folder
    holdout: float
    """Share of the training rows that are moved to the evaluation split."""
    with_samples: bool
    """Collect prompts of the evaluation split."""

    def __call__(self, item: ChunkItem) -> ChunkResult:
        content = read_chunk(item.chunk)
        rules = rules_of(self.method)
        edges = length_edges(self.render.max_length)
        result = ChunkResult(item, content.lines, np.zeros(len(edges) - 1, np.int64))
        renderer = load_renderer(self.render)
        writers = {
            split: TokenFile(self.attempt, f"{TOKENS}/{split}-{item.number:06d}.parquet")
            for split in ("train", "eval")
        }
        try:
            for pending in _slices(self._usable(item, rules, content.rows, result)):
                self._render(renderer, pending, result, writers)
        finally:
            for writer in writers.values():
                writer.close()
        for split, writer in writers.items():
            result.groups[split] = writer.groups
        return result

    def _usable(
        self,
        item: ChunkItem,
        rules: ExampleRules,
        rows: Iterable[tuple[int, Row | BadRow]],
        result: ChunkResult,
    ) -> Iterable[_Pending]:
        for index, (line, row) in enumerate(rows):
            result.rows += 1
            if isinstance(row, BadRow):
                _quarantine(result, line, row.reason, row.raw)
                continue
            try:
                normalised = normalise(row, item.format)
                examples = examples_of(normalised, self.method)
                adapted = [rules.adapt(example) for example in examples]
            except RowError as error:
                _quarantine(result, line, str(error), _excerpt(row))
                continue
            held_out = self.holdout > 0 and share_of(normalised, "holdout") < self.holdout
            split = "eval" if held_out else item.split
            copies = _copies(normalised, item.weight)
            pairs = zip(examples, adapted, strict=True)
            for example, text in pairs if copies > 0 else ():
                extra = rules.extra(row, example)
                encoded = None if extra is None else json.dumps(extra)
                yield _Pending(index, line, split, copies, row, text, encoded)

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
            for document in outcome.documents:
                for _ in range(row.copies):
                    writers[row.split].add(row.index, document, row.extra)
            self._sample(renderer, row, outcome, result)
        lengths = [
            size
            for outcome in rendered
            for document in outcome.documents
            for size in document.lengths
        ]
        result.histogram += np.histogram(lengths, length_edges(self.render.max_length))[0]
        for writer in writers.values():
            writer.flush()

    def _sample(
        self, renderer: Renderer, row: _Pending, outcome: Rendered, result: ChunkResult
    ) -> None:
        is_held_out = row.split == "eval" and len(outcome.documents) > 0
        if self.with_samples and is_held_out and len(result.samples) < SAMPLES_KEPT:
            prompt = renderer.prompt(row.normalised)
            if prompt is not None:
                result.samples.append((row.index, prompt))


class TokenFile:
    """A Parquet file of documents; created when the first document is written."""

    def __init__(self, attempt: Folder, name: str) -> None:
        self._attempt = attempt
        self._name = name
        self._writer: Any = None
        self._rows: list[int] = []
        self._documents: list[Document] = []
        self._extras: list[str | None] = []
        self.groups: list[TokenGroup] = []

    def add(self, row: int, document: Document, extra: str | None) -> None:
        """Buffer a document until the next flush.

        Args:
            row: number of its row within the chunk.
            document: tokens of the row.
            extra: further input of the method from this row, as JSON.
        """
        self._rows.append(row)
        self._documents.append(document)
        self._extras.append(extra)

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
        self._rows, self._documents, self._extras = [], [], []

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
        raise InputError(f"{chunk.file.uri}:{line}: {error}")
    _quarantine(result, row.line, str(error), _excerpt(row.row))


def _excerpt(row: Row) -> str:
    return shorten(json.dumps(row, ensure_ascii=True, default=str))
