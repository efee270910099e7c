"""The stage that compares the scores of all rows: the rows with low ones are dropped.

    score    each chunk: the number that the user's function or a reward model gives each row
    cut      here: the lowest score that stays
    drop     each chunk: the rows below it

This process holds 16 bytes a row: its score, and a number for its content. Rows of equal scores are
ordered by that number, so that which of them stay does not depend on the order of the data; equal
rows by their place.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.storage import Folder
from ...config.curation import ScoreStage
from ...config.source import RowFunction
from ..row_changes import call
from ..rows import Row, excerpt
from ..shapes import Example, RowError
from ..tasks import RunTasks
from .files import StageFile, facts_of, index_file, score_file, scores_in
from .funnel import BAD_ROW, MOST_BAD_OF_CHUNK, Counts
from .grouping import StageChunk, items_of, with_first
from .samples import sample_of
from .stage import Item
from .words import Hashes

Values = NDArray[np.float64]

OpenScorer = Callable[[str], Callable[[Sequence[Example]], list[float]]]
"""Opens the reward model of a run, by its folder; that gives the score of each row. A function at
the top level of a module: tasks take it along."""

_TOGETHER = 256
"""Rows that are scored at once."""
_SAMPLES = 3
_SAMPLED_CHUNKS = 3
LOW = "its score is too low"
_QUANTILES = {"lowest": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "highest": 1.0}


@dataclass(frozen=True)
class Scores:
    """The scores of a chunk's rows, and a number for the content of each."""

    scores: Values
    contents: Hashes


@dataclass(frozen=True)
class Cut:
    """The border below which rows are dropped: a score, and an order of rows that have it."""

    score: float
    content: int = 2**64 - 1
    """Of rows with this score, those stay whose content's number is smaller."""
    number: int = 2**62
    """Of equal rows with this score, those stay up to this number among all rows."""

    def stays(self, scores: Values, contents: Hashes, first: int) -> NDArray[np.bool_]:
        """Whether each row of a chunk stays; `first` is the number of its first row."""
        content, numbers = np.uint64(self.content), first + np.arange(len(scores))
        is_first = (contents < content) | ((contents == content) & (numbers <= self.number))
        stays: NDArray[np.bool_] = (scores > self.score) | ((scores == self.score) & is_first)
        return stays


def drop_low_scores(
    settings: ScoreStage,
    chunks: Sequence[StageChunk],
    folder: Folder,
    scores: Folder,
    run_tasks: RunTasks,
    open_scorer: OpenScorer | None,
    report: Callable[[int, int], None],
) -> tuple[list[Counts], dict[str, Any]]:
    """Score all rows, and drop those with low scores; writes the stage's files.

    Args:
        settings: the stage.
        chunks: the rows.
        folder: of the stage.
        scores: folder of the scores, which stages share that differ in the share alone.
        run_tasks: runs the tasks.
        open_scorer: opens a reward model.
        report: is given the chunks that are scored, and all chunks.

    Returns:
        What the stage counted of each chunk, and the distribution of the scores.
    """
    task = ScoreTask(scores.create(), settings.function, settings.run, open_scorer)
    scored: list[Scores] = []
    on_gpus = {} if settings.run is None else {"on_gpus": True}
    for done in run_tasks(task, chunks, **on_gpus):
        scored.append(done)
        report(len(scored), len(chunks))
    firsts = [first for _, first in with_first(chunks)]
    cut = find_cut(settings, scored, firsts)
    items = []
    sampled = 0
    left: list[Values] = [np.zeros(0)]
    for chunk, first, own in zip(chunks, firsts, scored, strict=True):
        stays = cut.stays(own.scores, own.contents, first)
        left.append(own.scores[stays])
        shows = not stays.all() and sampled < _SAMPLED_CHUNKS
        sampled += shows
        items.append(CutItem(chunk, first, shows))
    counted = list(run_tasks(CutTask(folder, scores, cut), items))
    before = np.concatenate([np.zeros(0), *(own.scores for own in scored)])
    quantiles = {"before": _quantiles(before), "after": _quantiles(np.concatenate(left))}
    return counted, {"scores": quantiles}


def find_cut(settings: ScoreStage, scored: Sequence[Scores], firsts: Sequence[int]) -> Cut:
    """The lowest row that stays.

    Args:
        settings: the stage.
        scored: the rows of each chunk.
        firsts: the number of the first row of each chunk.
    """
    if settings.min is not None:
        return Cut(settings.min)
    assert settings.keep_top is not None
    scores = np.concatenate([np.zeros(0), *(own.scores for own in scored)])
    if len(scores) == 0:
        return Cut(0.0)
    most = max(1, round(settings.keep_top * len(scores)))
    lowest = -np.partition(-scores, most - 1)[most - 1]
    equal = [np.flatnonzero(own.scores == lowest) for own in scored]
    contents = np.concatenate(
        [own.contents[places] for own, places in zip(scored, equal, strict=True)]
    )
    numbers = np.concatenate([first + places for first, places in zip(firsts, equal, strict=True)])
    room = most - int((scores > lowest).sum())
    last = np.lexsort((numbers, contents))[room - 1]
    return Cut(float(lowest), int(contents[last]), int(numbers[last]))


def _quantiles(scores: Values) -> dict[str, float]:
    if len(scores) == 0:
        return {}
    values = np.quantile(scores, list(_QUANTILES.values()), method="lower")
    return dict(zip(_QUANTILES, map(float, values), strict=True))


@dataclass(frozen=True)
class ScoreTask:
    """Scores the rows of a chunk; of a chunk whose file is complete, nothing is done again."""

    folder: Folder
    function: RowFunction | None
    run: str | None
    open_scorer: OpenScorer | None

    def __call__(self, chunk: StageChunk) -> Scores:
        number = chunk.rows.chunk
        if facts_of(self.folder, number) is None:
            counts = Counts()
            with score_file(self.folder, number).completing(counts.to_json) as file:
                self._score(chunk, file, counts)
        rows = scores_in(self.folder, number)
        return Scores(rows.scores, rows.contents)

    def _score(self, chunk: StageChunk, file: StageFile, counts: Counts) -> None:
        items = items_of(chunk)
        while batch := list(islice(items, _TOGETHER)):
            kept = []
            for item, value in zip(batch, self._values(batch), strict=True):
                if isinstance(value, float):
                    kept.append((item, value))
                    continue
                counts.dropped[BAD_ROW] += 1
                if len(counts.bad) < MOST_BAD_OF_CHUNK:
                    row = excerpt(item.row)
                    counts.bad.append({"line": item.line, "reason": value, "row": row})
            contents = np.frombuffer(b"".join(item.digest[:8] for item, _ in kept), np.uint64)
            indices, sizes = [item.index for item, _ in kept], [item.size for item, _ in kept]
            file.write([indices, [value for _, value in kept], contents, sizes])

    def _values(self, items: Sequence[Item]) -> Iterator[float | str]:
        """The score of each row, or why it has none."""
        if self.function is not None:
            return (_called(self.function, item.row) for item in items)
        assert self.run is not None and self.open_scorer is not None
        values = self.open_scorer(self.run)([item.example for item in items])
        return (_checked(value, "the reward model") for value in values)


def _called(function: RowFunction, row: Row) -> float | str:
    try:
        return _checked(call(function, row, "score"), f"score {function.name}")
    except RowError as error:
        return str(error)


def _checked(value: Any, who: str) -> float | str:
    """A finite number, or why it is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return f"{who} returns {type(value).__name__}; expected a number"
    try:
        score = float(value)
    except OverflowError:  # an integer beyond all floats
        score = math.inf
    return score if math.isfinite(score) else f"{who} returns {score}; expected a finite number"


@dataclass(frozen=True)
class CutItem:
    """A chunk with scores."""

    chunk: StageChunk
    first: int
    """Number of its first row."""
    shows: bool
    """Whether the first of the rows that are dropped are shown."""


@dataclass(frozen=True)
class CutTask:
    """Writes which rows of a chunk are left."""

    folder: Folder
    scores: Folder
    cut: Cut

    def __call__(self, item: CutItem) -> Counts:
        chunk = item.chunk
        number = chunk.rows.chunk
        facts, rows = facts_of(self.scores, number), scores_in(self.scores, number)
        assert facts is not None
        counts = Counts.from_json(facts)
        stays = self.cut.stays(rows.scores, rows.contents, item.first)
        counts.rows_in, counts.rows_out = chunk.left, int(stays.sum())
        counts.characters_in = int(rows.characters.sum())
        counts.characters_out = int(rows.characters[stays].sum())
        if not stays.all():
            counts.dropped[LOW] = int((~stays).sum())
        if item.shows:
            low = dict(zip(rows.index[~stays][:_SAMPLES], rows.scores[~stays], strict=False))
            counts.samples += _samples(chunk, low)
        with index_file(self.folder, number).completing(counts.to_json) as file:
            file.write([rows.index[stays]])
        return counts


def _samples(chunk: StageChunk, low: Mapping[int, float]) -> list[dict[str, Any]]:
    """Rows with low scores, by their numbers within the chunk, as the funnel shows them."""
    chosen = islice((item for item in items_of(chunk) if item.index in low), len(low))
    return [sample_of(item.line, f"{LOW} ({low[item.index]:.4g})", item.row) for item in chosen]
