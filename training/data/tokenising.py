"""The first pass over the data: a chunk of a source file becomes a file of tokens."""

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
CARRIED_BAD_ROWS = 1000
SAMPLES_KEPT = 1000

# Rows rendered at a time: large enough for the tokenizer's threads, small enough that its
# encodings (some hundred bytes a token) stay a small part of the memory.
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
    """What one task of the first pass works on."""

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
    """A row that could not be used."""

    line: int
    """Counted from 1 at the chunk's first line."""
    reason: str
    raw: str


@dataclass
class ChunkResult:
    """What a task of the first pass found and wrote."""

    item: ChunkItem
    lines: int
    """Lines of the chunk, to number those of the next one."""
    histogram: NDArray[np.int64]
    """Documents by their length: one count fewer than edges."""
    rows: int = 0
    bad_rows: list[Quarantined] = field(default_factory=list)
    """The first ones; `dropped` counts them all."""
    dropped: Counter[str] = field(default_factory=Counter)
    groups: dict[str, list[TokenGroup]] = field(default_factory=lambda: {"train": [], "eval": []})
    samples: list[tuple[int, Prompt]] = field(default_factory=list)
    """Row number within the chunk, and prompt."""


@dataclass(frozen=True)
class _Pending:
    """A usable row that waits to be rendered."""

    index: int
    line: int
    split: str
    copies: int
    row: Row
    normalised: Example
    """As its method tokenises it."""
    extra: str | None


def length_edges(max_length: int) -> NDArray[np.int64]:
    """Edges of the length histogram's bins."""
    return np.unique(np.linspace(0, max_length, 33).astype(np.int64))


@dataclass(frozen=True)
class TokeniseTask:
    """Reads, normalises, renders and tokenises a chunk; writes its documents."""

    render: RenderSettings
    method: str
    """Its kind."""
    attempt: Folder
    holdout: float
    """Share of the training rows that go to the evaluation split."""
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
                _quarantine(result, line, str(error), _shown(row))
                continue
            held_out = self.holdout > 0 and share_of(normalised, "holdout") < self.holdout
            split = "eval" if held_out else item.split
            copies = _copies(normalised, item.weight)
            pairs = zip(examples, adapted, strict=True)
            for example, text in pairs if copies > 0 else ():
                extra = rules.extra(row, example)
                told = None if extra is None else json.dumps(extra)
                yield _Pending(index, line, split, copies, row, text, told)

    def _render(
        self,
        renderer: Renderer,
        pending: list[_Pending],
        result: ChunkResult,
        writers: dict[str, "TokenFile"],
    ) -> None:
        rendered = renderer.render([one.normalised for one in pending])
        for one, outcome in zip(pending, rendered, strict=True):
            if outcome.error is not None:
                _tell_error(result, one, outcome.error)
                continue
            if outcome.dropped is not None:
                result.dropped[outcome.dropped] += 1
            for document in outcome.documents:
                for _ in range(one.copies):
                    writers[one.split].add(one.index, document, one.extra)
            self._sample(renderer, one, outcome, result)
        lengths = [
            size for one in rendered for document in one.documents for size in document.lengths
        ]
        result.histogram += np.histogram(lengths, length_edges(self.render.max_length))[0]
        for writer in writers.values():
            writer.flush()

    def _sample(
        self, renderer: Renderer, one: _Pending, outcome: Rendered, result: ChunkResult
    ) -> None:
        wanted = self.with_samples and one.split == "eval" and len(outcome.documents) > 0
        if wanted and len(result.samples) < SAMPLES_KEPT:
            prompt = renderer.prompt(one.normalised)
            if prompt is not None:
                result.samples.append((one.index, prompt))


class TokenFile:
    """A Parquet file of documents, made when the first one is written."""

    def __init__(self, attempt: Folder, name: str) -> None:
        self._attempt = attempt
        self._name = name
        self._writer: Any = None
        self._rows: list[int] = []
        self._documents: list[Document] = []
        self._extras: list[str | None] = []
        self.groups: list[TokenGroup] = []

    def add(self, row: int, document: Document, extra: str | None) -> None:
        """Write a document with the next flush.

        Args:
            row: its number within the chunk.
            document: its tokens.
            extra: what else its method wants of the row, as JSON.
        """
        self._rows.append(row)
        self._documents.append(document)
        self._extras.append(extra)

    def flush(self) -> None:
        """Write what was added as one row group."""
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
    part: list[_Pending] = []
    size = 0
    for one in pending:
        part.append(one)
        size += sum(map(len, one.normalised.contents))
        if size >= _SLICE_CHARACTERS or len(part) >= _SLICE_ROWS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _copies(row: Example, weight: float) -> int:
    """Whole copies, and one more for the fraction of rows that a weight's fraction says."""
    whole = int(weight)
    fraction = weight - whole
    return whole + (1 if fraction > 0 and share_of(row, "weight") < fraction else 0)


def _quarantine(result: ChunkResult, line: int, reason: str, raw: str) -> None:
    result.dropped[BAD_ROW] += 1
    if len(result.bad_rows) < CARRIED_BAD_ROWS:
        result.bad_rows.append(Quarantined(line, reason, raw))


def _tell_error(result: ChunkResult, one: _Pending, error: RowError) -> None:
    if isinstance(error, UnstableTemplate):
        chunk = result.item.chunk
        line = first_line(chunk) - 1 + one.line
        raise InputError(f"{chunk.file.uri}:{line}: {error}")
    _quarantine(result, one.line, str(error), _shown(one.row))


def _shown(row: Row) -> str:
    return shorten(json.dumps(row, ensure_ascii=True, default=str))
