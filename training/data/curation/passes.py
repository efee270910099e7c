"""A pass over the rows: neighbouring stages that decide about each row on its own, together."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

from ...common.storage import Folder
from ..reading import read_chunk
from ..render_settings import RenderSettings
from ..row_changes import RowChanges, change_rows
from ..rows import BadRow, Row, excerpt
from ..shapes import RowError
from ..sources import Chunk
from .files import StageFile, StageRows, facts_of, index_file, row_file
from .funnel import BAD_ROW, LEFT_OUT, MOST_BAD_OF_CHUNK, Counts
from .samples import sample_of
from .stage import Apply, Item, Outcome, Reading, StageContext
from .stages import ROW_STAGES

READ = "read"
"""The kind of a first step that does no more than read."""
SAMPLES = 3
"""Dropped rows of a chunk that are shown."""
_CHARACTERS = 500_000
_ROWS = 1000
_WHOLE = re.compile(r"(-?\d+)\.0+", re.ASCII)
"""The text of a whole number, as a column of numbers with gaps has it."""
_FOREIGN = ("parquet", "arrow")
"""Files whose values may be other than those of JSON."""
UNUSABLE = "not usable after it"
"""Why a row is dropped from which a stage removed what the method needs."""


@dataclass(frozen=True)
class Step:
    """One stage of a pass, and the folder that it writes to."""

    key: str
    """Name of its folder."""
    kind: str
    settings: Any
    """Its section of the recipe; None to read only."""
    writes_rows: bool


@dataclass(frozen=True)
class PassItem:
    """A chunk on its way through a pass."""

    number: int
    chunk: Chunk
    reading: Reading
    changes: RowChanges
    rows: str | None
    """Key of the stage that wrote its rows; None: they are read from the source."""
    left: str | None
    """Key of the stage before the pass."""


@dataclass(frozen=True)
class PassTask:
    """Takes a chunk through neighbouring stages."""

    folder: Folder
    """Folder that holds one folder per stage."""
    steps: tuple[Step, ...]
    render: RenderSettings
    max_row_bytes: int
    group_by: str | None

    def __call__(self, item: PassItem) -> list[Counts]:
        """What each stage counted; nothing is done again for a chunk whose files are complete."""
        done = [facts_of(self.folder / step.key, item.number) for step in self.steps]
        if all(facts is not None for facts in done):
            return [Counts.from_json(facts) for facts in done if facts is not None]
        works = [_Work(self, step, item) for step in self.steps]
        try:
            for batch in _batches(self._items(item, works[0].counts)):
                left = batch
                for work in works:
                    left = work.take(left)
            for work in works:
                work.counts.rows, work.counts.lines = works[0].counts.rows, works[0].counts.lines
                work.file.close(work.counts.to_json())
        except BaseException:
            for work in works:
                work.file.abort()
            raise
        return [work.counts for work in works]

    def _items(self, item: PassItem, counts: Counts) -> Iterator[Item]:
        if item.rows is None:
            yield from self._read(item, counts)
            return
        assert item.left is not None
        for stored in StageRows(self.folder, item.number, item.rows, item.left):
            yield Item.read(stored.index, stored.line, stored.row, item.reading, stored.group)

    def _read(self, item: PassItem, counts: Counts) -> Iterator[Item]:
        content = read_chunk(item.chunk, self.max_row_bytes)
        is_foreign = may_be_foreign(item.chunk, item.changes)
        own, rows = tee(content.rows)
        changed = zip(own, change_rows(rows, item.changes), strict=True)
        for index, ((_, original), (line, row)) in enumerate(changed):
            counts.rows += 1
            if row is None:
                counts.rows_in += 1
                counts.dropped[LEFT_OUT] += 1
                continue
            if isinstance(row, BadRow):
                _quarantine(counts, line, row.reason, row.raw)
                continue
            try:
                group = group_of(self.group_by, original, row)
                read = Item.read(index, line, row, item.reading, group)
                yield read.as_json(item.reading) if is_foreign else read
            except RowError as error:
                _quarantine(counts, line, str(error), excerpt(row))
        counts.lines = content.lines


def group_of(name: str | None, original: Row | BadRow, row: Row) -> str | None:
    """The group of a row, whose column its source's changes may rename or make. A number or a truth
    value is that of its text: 7 in JSON is 7.0 in a column with gaps, and "7" or "7.0" in CSV.

    Args:
        name: data.holdout.group_by.
        original: the row as it is read.
        row: the row as its source's changes make it.

    Raises:
        RowError: it has no such column, or no value in it: null, NaN or an empty text; or one that
            JSON lacks.
    """
    if name is None:
        return None
    values = (source.get(name) for source in (original, row) if isinstance(source, Mapping))
    value = next((value for value in values if not _is_missing(value)), None)
    if value is None:
        held = any(isinstance(of, Mapping) and name in of for of in (original, row))
        problem = f"no value in the column {name}" if held else f"no column {name}"
        raise RowError(
            f"there is {problem}, which data.holdout.group_by names; map of the source may make it"
        )
    try:
        return _group(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(
            f"the column {name}, which data.holdout.group_by names, holds no value of JSON: {error}"
        ) from None


def _group(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float):
        value = str(value)
    if isinstance(value, Mapping | list):  # keys that are no texts have no order
        value = json.loads(json.dumps(value, default=str))
    return json.dumps(_spelled(value), sort_keys=True, default=str)


def _is_missing(value: object) -> bool:
    """True also for what a table of pandas has in place of a missing number, and CSV of all."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _spelled(value: object) -> object:
    """A text in the form that whole numbers and truth values have: 7 for 7.0, true for True."""
    if not isinstance(value, str):
        return value
    whole = _WHOLE.fullmatch(value)
    if whole is not None:
        return whole[1]
    return value.lower() if value.lower() in ("true", "false") else value


def may_be_foreign(chunk: Chunk, changes: RowChanges) -> bool:
    """True if rows may hold values that JSON lacks."""
    return chunk.kind in _FOREIGN or changes.function is not None


class _Work:
    """A stage at work on a chunk."""

    def __init__(self, task: PassTask, step: Step, item: PassItem) -> None:
        self._reading = item.reading
        self._writes_rows = step.writes_rows
        self._hides = step.kind == "redact"  # what it drops holds personal data
        folder = task.folder / step.key
        self._apply = _apply_of(step, StageContext(task.render, folder))
        self.counts = Counts()
        self.file: StageFile = (row_file if step.writes_rows else index_file)(folder, item.number)

    def take(self, items: Sequence[Item]) -> list[Item]:
        """Decide about rows, and write those that are left; returns these."""
        self.counts.rows_in += len(items)
        left = []
        for item, outcome in zip(items, self._apply(items), strict=True):
            self.counts.characters_in += item.size
            kept = self._follow(item, outcome)
            if outcome.language is not None:
                self.counts.languages_in[outcome.language] += 1
                self.counts.languages_out[outcome.language] += kept is not None
            if kept is not None:
                self.counts.characters_out += kept.size
                left.append(kept)
        self.counts.rows_out += len(left)
        if left:
            self._write(left)
        return left

    def _follow(self, item: Item, outcome: Outcome) -> Item | None:
        """The item as it goes on; None if it is dropped."""
        if outcome.bad is not None:
            self.counts.rows_in -= 1  # counted with the others that are bad
            self.counts.characters_in -= item.size
            _quarantine(self.counts, item.line, outcome.bad, excerpt(item.row))
            return None
        if outcome.dropped is not None:
            self._drop(item, outcome.dropped, outcome.language)
            return None
        if outcome.row is None:
            return item
        try:
            changed = item.with_row(outcome.row, self._reading)
        except RowError:
            self._drop(item, UNUSABLE, None)
            return None
        self.counts.changed += 1
        return changed

    def _drop(self, item: Item, reason: str, language: str | None) -> None:
        self.counts.dropped[reason] += 1
        if len(self.counts.samples) < SAMPLES:
            reason = reason if language is None else f"{reason} ({language})"
            sample = sample_of(item.line, reason, None if self._hides else item.row)
            self.counts.samples.append(sample)

    def _write(self, items: Sequence[Item]) -> None:
        columns: list[list[Any]] = [[item.index for item in items]]
        if self._writes_rows:
            columns.append([item.line for item in items])
            columns.append([json.dumps(item.row) for item in items])
            columns.append([item.group for item in items])
        self.file.write(columns)


def _apply_of(step: Step, context: StageContext) -> Apply:
    if step.kind == READ:
        return lambda items: [Outcome()] * len(items)
    return ROW_STAGES[step.kind](step.settings, context)


def _quarantine(counts: Counts, line: int, reason: str, raw: str) -> None:
    counts.rows_in += 1
    counts.dropped[BAD_ROW] += 1
    if len(counts.bad) < MOST_BAD_OF_CHUNK:
        counts.bad.append({"line": line, "reason": reason, "row": raw})


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.size
        if size >= _CHARACTERS or len(batch) >= _ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
