"""Takes the rows of a recipe through its stages; a stage that is finished is not done again."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from ...common.errors import InputError
from ...common.formatting import count
from ...common.progress import Progress
from ...common.storage import Folder
from ...config.recipe import Recipe
from ..reading import read_chunk
from ..render_settings import RenderSettings
from ..resolve import ResolvedData, ResolvedSource
from ..row_changes import RowChanges, change_rows
from ..rows import BadRow, Row
from ..sources import Chunk, plan_chunks
from ..tasks import RunTasks
from .decontaminate import REFERENCE, ReferenceItem, ReferenceTask, reference_format, reference_of
from .files import MANIFEST, STAGES, WORK, StageRows, remove_leftovers
from .funnel import BAD_ROW, LEFT_OUT, SAMPLES, Counts, StageResult, describe_funnel
from .grouping import StageChunk, drop_duplicates, hold_out
from .passes import PassItem, PassTask, Step
from .plan import DEDUPLICATE, HOLDOUT, SCORE, PlannedStage, ReferenceSource, plan_stages
from .samples import shown_sample
from .scoring import OpenScorer, drop_low_scores
from .stage import Reading

_SHOWN = 3
"""Rows that cannot be used, in a message."""


@dataclass(frozen=True)
class TrainChunk:
    """A part of the training data."""

    number: int
    source: int
    """Number of its source."""
    chunk: Chunk
    reading: Reading
    changes: RowChanges


@dataclass(frozen=True)
class Curated:
    """Rows that went through all stages."""

    folder: Folder
    """Folder that holds one folder per stage."""
    rows: str
    """Key of the stage that wrote the rows' content."""
    left: str
    """Key of the last stage."""
    held: Folder | None
    """The stage that says of each row whether it is held out; None without one."""
    chunks: tuple[TrainChunk, ...]
    counts: tuple[Counts, ...]
    """What the first stage counted of each chunk: its rows and lines."""
    funnel: tuple[dict[str, Any], ...]
    """What each stage dropped, and samples of it."""
    bad: tuple[dict[str, Any], ...]
    """file, line, reason and row of rows that cannot be used."""
    left_rows: tuple[int, ...]
    """Rows of each source that are left."""
    stages: tuple[str, ...] = ()
    """Keys of all stages, and of their scores."""

    def rows_of(self, chunk: int) -> StageRows:
        """The rows of a chunk that are left."""
        return StageRows(self.folder, chunk, self.rows, self.left)


BadRows = Callable[[Sequence[dict[str, Any]], int, int], None]
"""Is given rows that cannot be used, the number of all of them, and that of the rows read; refuses
too many."""


def curate(
    recipe: Recipe,
    data: ResolvedData,
    folder: Folder,
    run_tasks: RunTasks,
    progress: Progress,
    check_bad: BadRows,
    open_scorer: OpenScorer | None = None,
    window: "Window | None" = None,
) -> Curated:
    """Take the training rows through the recipe's stages.

    Args:
        recipe: the recipe; it has stages, a mixture or groups of held-out rows.
        data: its sources.
        folder: <storage>/prepared.
        run_tasks: runs the tasks, in this process or on Ray.
        progress: receives a status after every finished task.
        check_bad: see `BadRows`; called after each pass.
        open_scorer: opens the reward model of a stage that has one.
        window: the only part of the rows that is taken; `folder` then holds no other.

    Raises:
        InputError: a stage leaves no row, a source is wrong, or too many rows are bad.
        RunError: a stage's file is damaged.
    """
    window = window or Window(plan_stages(recipe, data), train_chunks(recipe, data))
    sources = len(data.train)
    work = _Curation(recipe, sources, folder / STAGES, run_tasks, progress, window, open_scorer)
    return work.run(check_bad)


def all_chunks(sources: Sequence[ResolvedSource]) -> Iterator[tuple[int, Chunk]]:
    """(number of its source, chunk) of every part of some sources, in order."""
    for number, source in enumerate(sources):
        for file in source.files:
            yield from ((number, chunk) for chunk in plan_chunks(file))


def train_chunks(
    recipe: Recipe, data: ResolvedData, chunks: Iterable[tuple[int, Chunk]] | None = None
) -> tuple[TrainChunk, ...]:
    """The parts of the training data, in order.

    Args:
        recipe: the recipe.
        data: its sources.
        chunks: (number of its source, chunk) of the parts that are taken; None: all.
    """
    method = recipe.method
    readings = [Reading(source.format, method.kind, method.columns) for source in data.train]
    parts = all_chunks(data.train) if chunks is None else chunks
    return tuple(
        TrainChunk(n, number, chunk, readings[number], data.train[number].changes)
        for n, (number, chunk) in enumerate(parts)
    )


@dataclass(frozen=True)
class Window:
    """Parts of the training data that go through stages together."""

    stages: tuple[PlannedStage, ...]
    chunks: tuple[TrainChunk, ...]
    place: Callable[[Chunk, int], int] | None = None
    """Returns the number of a chunk's line in its file; None where the chunks follow one another,
    so that their lines are counted."""
    references: dict[str, bytes] = field(default_factory=dict)
    """Evaluation data with which stages compare, by the stage's key: read once for all windows."""
    may_be_empty: bool = False
    """True if stages may leave no row of it."""


class _Curation:
    """The stages of a recipe, and how far they are."""

    def __init__(
        self,
        recipe: Recipe,
        sources: int,
        folder: Folder,
        run_tasks: RunTasks,
        progress: Progress,
        window: Window,
        open_scorer: OpenScorer | None,
    ) -> None:
        self._recipe = recipe
        self._open_scorer = open_scorer
        self._folder = folder
        self._run_tasks = run_tasks
        self._progress = progress
        self._sources = sources
        self._window = window
        self._stages = window.stages
        self._chunks = window.chunks
        self._results: list[StageResult] = []

    def run(self, check_bad: BadRows) -> Curated:
        for by_row, group in groupby(self._stages, key=lambda stage: stage.decides_by_row):
            stages = list(group)
            finished = [self._finished(stage) for stage in stages]
            done = finished.index(None) if None in finished else len(stages)
            self._results += [result for result in finished[:done] if result is not None]
            if stages[done:] and by_row:
                self._pass(stages[done:])
            for stage in [] if by_row else stages[done:]:
                (self._by_score if stage.kind == SCORE else self._among_all)(stage)
            bad = sum(result.total.dropped[BAD_ROW] for result in self._results)
            check_bad(self._bad_rows(), bad, self._rows_read)
            if not self._window.may_be_empty:
                self._check_rows_are_left()
        return self._curated()

    @property
    def _rows_read(self) -> int:
        return sum(counts.rows for counts in self._results[0].chunks)

    def _finished(self, stage: PlannedStage) -> StageResult | None:
        (self._folder / stage.key).touch()
        try:
            result = StageResult.from_json(json.loads((self._folder / stage.key).read(MANIFEST)))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return result if len(result.chunks) == len(self._chunks) else None

    def _finish(
        self, stage: PlannedStage, chunks: Sequence[Counts], facts: dict[str, Any] | None = None
    ) -> None:
        result = StageResult(stage.kind, tuple(chunks), facts or {})
        folder = self._folder / stage.key
        folder.write(MANIFEST, json.dumps(result.to_json()).encode())
        remove_leftovers(folder)
        self._results.append(result)

    def _before(self) -> tuple[str | None, str | None]:
        """Keys of the stage that wrote the rows, and of the last finished stage."""
        done = self._stages[: len(self._results)]
        if not done:
            return None, None
        rows = [stage.key for n, stage in enumerate(done) if n == 0 or stage.rewrites]
        lefts = [stage.key for stage in done if stage.kind != HOLDOUT]
        return rows[-1], lefts[-1]

    def _pass(self, stages: Sequence[PlannedStage]) -> None:
        """Take all chunks through neighbouring stages that decide by row."""
        for stage in stages:
            folder = (self._folder / stage.key).create()
            if stage.references and not folder.exists(REFERENCE):
                made = self._window.references
                if stage.key not in made:
                    made[stage.key] = self._reference(stage)
                folder.write(REFERENCE, made[stage.key])
        rows, left = self._before()
        task = PassTask(
            folder=self._folder,
            steps=tuple(
                Step(
                    stage.key,
                    stage.kind,
                    stage.settings,
                    stage.rewrites or stage is self._stages[0],
                )
                for stage in stages
            ),
            render=RenderSettings.of(self._recipe),
            max_row_bytes=self._recipe.data.max_row_bytes,
            group_by=self._recipe.data.grouped_by,
        )
        items = [
            PassItem(each.number, each.chunk, each.reading, each.changes, rows, left)
            for each in self._chunks
        ]
        words = ", ".join(stage.kind for stage in stages)
        counted = []
        for counts in self._run_tasks(task, items):
            counted.append(counts)
            left_now = sum(each[-1].rows_out for each in counted)
            self._report(words, len(counted), len(items), f"{count(left_now)} rows left")
        for number, stage in enumerate(stages):
            self._finish(stage, [counts[number] for counts in counted])

    def _reference(self, stage: PlannedStage) -> bytes:
        method, limit = self._recipe.method, self._recipe.data.max_row_bytes
        task = ReferenceTask(method.kind, method.columns, stage.settings.ngram, limit)
        items = []
        for source in stage.references:
            own = source.format or reference_format(_rows(source, limit), method.kind)
            chunks = (chunk for file in source.files for chunk in plan_chunks(file))
            items += [ReferenceItem(chunk, source.changes, own) for chunk in chunks]
        most_bad = self._recipe.data.max_bad_rows
        return reference_of(self._run_tasks(task, items), stage.setting, most_bad)

    def _among_all(self, stage: PlannedStage) -> None:
        """Run a stage that compares all rows with one another."""
        folder = (self._folder / stage.key).create()
        chunks = self._stage_chunks()
        work = (folder / f"{WORK}{uuid.uuid4().hex}").create()
        run = drop_duplicates if stage.kind == DEDUPLICATE else hold_out
        try:
            counted = run(stage.settings, chunks, folder, work, self._run_reported(stage.kind))
        finally:
            work.delete()
        self._report(stage.kind, 1, 1, f"{count(sum(c.rows_out for c in counted))} rows left")
        self._finish(stage, counted)

    def _run_reported(self, kind: str) -> RunTasks:
        """Run tasks, and say how many are done."""

        def run(task: Any, items: Sequence[Any], on_gpus: bool = False) -> Iterator[Any]:
            del on_gpus  # nothing is computed on them here
            for done, result in enumerate(self._run_tasks(task, items), start=1):
                self._report(kind, done, len(items), "comparing rows")
                yield result

        return run

    def _by_score(self, stage: PlannedStage) -> None:
        """Run a stage that drops rows with low scores."""
        folder, scores = (self._folder / stage.key).create(), self._folder / stage.scores
        counted, facts = drop_low_scores(
            *(stage.settings, self._stage_chunks(), folder, scores, self._run_tasks),
            open_scorer=self._open_scorer,
            report=lambda done, total: self._report(stage.kind, done, total, "scored"),
        )
        remove_leftovers(scores)
        self._finish(stage, counted, facts)

    def _stage_chunks(self) -> list[StageChunk]:
        rows, left = self._before()
        assert rows is not None and left is not None
        before = self._results[-1].chunks
        return [
            StageChunk(
                StageRows(self._folder, each.number, rows, left),
                each.reading,
                counts.rows_out,
                counts.characters_out,
            )
            for each, counts in zip(self._chunks, before, strict=True)
        ]

    def _report(self, words: str, done: int, total: int, text: str) -> None:
        self._progress.advance(done, total)
        self._progress.status(f"curating data: {words} {done}/{total}, {text}")

    def _check_rows_are_left(self) -> None:
        for stage, result in zip(self._stages, self._results, strict=False):
            if result.total.rows_out == 0:
                lines = describe_funnel(self._funnel())
                if first := self._bad_rows()[:_SHOWN]:
                    lines.append("rows that cannot be used, for example:")
                    lines += [f"  {bad['file']}:{bad['line']}: {bad['reason']}" for bad in first]
                raise InputError(
                    f"{stage.setting}: {stage.kind} leaves no row to train on; change it, or add "
                    "data. What each stage dropped:\n" + "\n".join(f"  {line}" for line in lines)
                )

    def _lines_before(self) -> list[int]:
        """Lines of each chunk's file before it."""
        lines: list[int] = []
        total = 0
        for each, counts in zip(self._chunks, self._results[0].chunks, strict=True):
            total = 0 if each.chunk.start == 0 else total
            lines.append(total)
            total += counts.lines
        return lines

    def _line(self, each: TrainChunk, line: int, before: Sequence[int]) -> int:
        """The number of a chunk's line in its file."""
        if self._window.place is None:
            return before[each.number] + line
        return self._window.place(each.chunk, line)

    def _bad_rows(self) -> list[dict[str, Any]]:
        before = self._lines_before()
        return [
            {
                "file": each.chunk.file.uri,
                "line": self._line(each, bad["line"], before),
                "reason": bad["reason"],
                "row": bad["row"],
            }
            for each in self._chunks
            for bad in sorted(self._bad_in(each), key=lambda bad: int(bad["line"]))
        ]

    def _bad_in(self, chunk: TrainChunk) -> Iterator[dict[str, Any]]:
        return (bad for result in self._results for bad in result.chunks[chunk.number].bad)

    def _funnel(self) -> list[dict[str, Any]]:
        return [
            self._entry(number, stage, result)
            for number, (stage, result) in enumerate(
                zip(self._stages, self._results, strict=False), start=1
            )
        ]

    def _entry(self, number: int, stage: PlannedStage, result: StageResult) -> dict[str, Any]:
        before = self._lines_before()
        total = result.total
        is_redacted = any(stage.kind == "redact" for stage in self._stages)
        samples = [
            shown_sample(
                sample,
                f"{each.chunk.file.place}:{self._line(each, sample['line'], before)}",
                is_redacted,
            )
            for each, sample in islice(
                (
                    (each, sample)
                    for each in self._chunks
                    for sample in result.chunks[each.number].samples
                ),
                SAMPLES,
            )
        ]
        return {
            "stage": f"{number} {stage.kind}",
            "rows_in": total.rows_in,
            "rows_out": total.rows_out,
            "changed": total.changed,
            "dropped": dict(sorted(total.dropped.items())),
            "characters_in": total.characters_in,
            "characters_out": total.characters_out,
            "samples": samples,
            **_languages(total),
            **result.facts,
        }

    def _curated(self) -> Curated:
        rows, left = self._before()
        assert rows is not None and left is not None
        last = self._stages[-1]
        left_rows = [0] * self._sources
        for each, counts in zip(self._chunks, self._results[-1].chunks, strict=True):
            left_rows[each.source] += counts.rows_out
        return Curated(
            folder=self._folder,
            rows=rows,
            left=left,
            held=self._folder / last.key if last.kind == HOLDOUT else None,
            chunks=self._chunks,
            counts=self._results[0].chunks,
            funnel=tuple(self._funnel()),
            bad=tuple(self._bad_rows()),
            left_rows=tuple(left_rows),
            stages=tuple(key for stage in self._stages for key in (stage.scores, stage.key) if key),
        )


def _languages(total: Counts) -> dict[str, Any]:
    if not total.languages_in:
        return {}
    before, after = dict(total.languages_in), dict(total.languages_out)
    return {"languages": {"before": before, "after": after}}


def _rows(source: ReferenceSource, max_bytes: int) -> Iterator[Row | BadRow]:
    for chunk in (chunk for file in source.files for chunk in plan_chunks(file)):
        for _, row in change_rows(read_chunk(chunk, max_bytes).rows, source.changes):
            if row is not None:
                yield row


def dropped_by_stage(funnel: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Rows that stages dropped, by kind and reason; rows that cannot be used stand apart."""
    dropped: dict[str, int] = {}
    for stage in funnel:
        for reason, rows in stage["dropped"].items():
            kind = stage["stage"].partition(" ")[2]
            name = reason if reason in (BAD_ROW, LEFT_OUT) else f"{kind}: {reason}"
            dropped[name] = dropped.get(name, 0) + rows
    return dropped
