"""Drops training rows that share a run of words with evaluation data."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from ...common.errors import InputError
from ...common.storage import Folder
from ...config.curation import DecontaminateStage
from ...config.source import KnownFormat
from ..formats import detect_format, read_examples
from ..reading import first_line, read_chunk
from ..row_changes import RowChanges, change_rows
from ..rows import BadRow, Row
from ..shapes import RowError
from ..sources import Chunk
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .texts import compared_texts, strings_of
from .words import Hashes, Runs, word_runs

REFERENCE = "reference.npy"
"""The runs of the evaluation data, sorted."""
_TEMPLATE_ROWS = 10
"""A run in more different evaluation rows than this belongs to a prompt's template."""
_TOGETHER = 1000
_SHOWN = 3

_CONTAMINATED = Outcome(dropped="shares words with evaluation data")


@dataclass(frozen=True)
class ReferenceItem:
    """A part of the evaluation data."""

    chunk: Chunk
    changes: RowChanges
    format: KnownFormat | None
    """None: rows of no shape that finray reads."""


@dataclass(frozen=True)
class References:
    """What a part of the evaluation data holds."""

    runs: Hashes
    owners: Hashes
    """Of each run, a number that stands for its row."""
    rows: int
    bad: tuple[str, ...]
    """file:line: reason of each row that cannot be read."""


@dataclass(frozen=True)
class ReferenceTask:
    """Collects the word runs of evaluation rows."""

    method: str
    columns: tuple[str, ...]
    ngram: int
    max_row_bytes: int

    def __call__(self, item: ReferenceItem) -> References:
        bad: list[str] = []
        rows = 0

        def read() -> Iterator[str]:
            nonlocal rows
            own = read_chunk(item.chunk, self.max_row_bytes).rows
            before = first_line(item.chunk) - 1
            for line, row in change_rows(own, item.changes):
                rows += 1
                if isinstance(row, BadRow):
                    bad.append(f"{item.chunk.file.place}:{before + line}: {row.reason}")
                elif row is not None:
                    yield self._text(row, item.format)

        texts = read()
        parts = [(np.zeros(0, np.uint64), np.zeros(0, np.uint64))]
        while batch := list(islice(texts, _TOGETHER)):
            runs = word_runs(batch, self.ngram)
            parts.append((runs.hashes, np.repeat(_content(runs), np.diff(runs.offsets))))
        hashes, owners = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        pairs = np.unique(np.stack([hashes, owners], axis=1), axis=0)
        return References(pairs[:, 0].copy(), pairs[:, 1].copy(), rows, tuple(bad))

    def _text(self, row: Row, row_format: KnownFormat | None) -> str:
        if row_format is not None:
            try:
                example, _ = read_examples(row, row_format, self.method, self.columns)
                return "\n".join(compared_texts(example))
            except RowError:
                pass
        try:
            return "\n".join(strings_of(row))
        except RecursionError:  # nested too deeply for a text
            return ""


def reference_format(rows: Iterable[Row | BadRow], method: str) -> KnownFormat | None:
    """The format of evaluation rows, if it is one that finray reads."""
    first = [("", row) for row in islice(rows, 20) if not isinstance(row, BadRow)]
    try:
        return detect_format(first, method) if first else None
    except InputError:
        return None


def reference_of(parts: Iterable[References], setting: str, most_bad: float) -> bytes:
    """The stage's file: the runs of all evaluation data, without those of templates.

    Args:
        parts: what the tasks collected.
        setting: the stage's key in the recipe.
        most_bad: data.max_bad_rows.

    Raises:
        InputError: too many rows cannot be read, or none has a word.
    """
    parts = list(parts)
    bad, rows = [each for part in parts for each in part.bad], sum(part.rows for part in parts)
    if len(bad) > most_bad * rows:
        first = "\n".join(f"  {each}" for each in bad[:_SHOWN])
        raise InputError(
            f"{setting}: data.max_bad_rows allows {most_bad:.1%}, and {len(bad)} of {rows} rows to "
            f"compare with cannot be read; correct them, or raise the limit. First:\n{first}"
        )
    if not any(len(part.runs) for part in parts):
        raise InputError(
            f"{setting}: the evaluation data has no words to compare with; name other data as "
            "against, or remove the stage"
        )
    arrays = [np.stack([part.runs, part.owners], axis=1) for part in parts]
    pairs = np.unique(np.concatenate([np.zeros((0, 2), np.uint64), *arrays]), axis=0)
    runs, counts = np.unique(pairs[:, 0], return_counts=True)
    stream = io.BytesIO()
    np.save(stream, runs[counts <= _TEMPLATE_ROWS])
    return stream.getvalue()


def decontaminate(settings: DecontaminateStage, context: StageContext) -> Apply:
    """The stage at work; its folder holds the evaluation data's runs."""
    reference = _reference(context.folder)

    def apply(items: Sequence[Item]) -> list[Outcome]:
        texts = ["\n".join(item.texts) for item in items]
        return [_CONTAMINATED if hit else KEPT for hit in _hits(texts, settings.ngram, reference)]

    return apply


def _hits(texts: Sequence[str], ngram: int, reference: Hashes) -> Iterator[bool]:
    runs = word_runs(texts, ngram)
    places = np.searchsorted(reference, runs.hashes)
    places[places == len(reference)] = 0
    is_shared = (
        reference[places] == runs.hashes if len(reference) else np.zeros(len(places), np.bool_)
    )
    counts = np.concatenate(([0], np.cumsum(is_shared)))
    return iter((counts[runs.offsets[1:]] > counts[runs.offsets[:-1]]).tolist())


@lru_cache(maxsize=2)
def _reference(folder: Folder) -> Hashes:
    reference: Hashes = np.load(io.BytesIO(folder.read(REFERENCE)))
    return reference


def _content(runs: Runs) -> Hashes:
    """A number for each text that is equal for texts of the same words."""
    sums = np.concatenate(([np.uint64(0)], np.cumsum(runs.hashes)))
    return sums[runs.offsets[1:]] - sums[runs.offsets[:-1]]
