"""One attempt at preparing data: tokenise and pack all of it, or one window of it."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..common.errors import InputError
from ..common.formatting import count, one_line
from ..common.progress import Progress
from ..common.storage import Folder
from ..config.model_folder import model_folder
from ..config.recipe import Recipe
from ..config.weight_checks import embedding_rows
from .assembling import AssembleTask, Part, SequenceFile, assemble_items, split_of
from .curation.curate import Curated, all_chunks, curate, dropped_by_stage
from .curation.curate import Window as CuratedWindow
from .curation.funnel import BAD_ROW
from .curation.mixing import weights_of
from .curation.scoring import OpenScorer
from .fingerprint import content_of
from .prepared import (
    QUARANTINE,
    SAMPLE_SCHEMA,
    SAMPLES,
    Histogram,
    Manifest,
    SourceSummary,
    Split,
    write_hashed,
)
from .render_settings import RenderSettings
from .rendering import OVERLONG, Prompt
from .resolve import ResolvedData, ResolvedSource
from .row_facts import count_common, quantiles
from .tasks import RunTasks
from .tokenising import (
    SAMPLES_KEPT,
    TOKENS,
    ChunkItem,
    ChunkResult,
    CuratedChunk,
    TokeniseTask,
    length_edges,
)
from .window_plan import Block, place_in_file

_QUARANTINED = 10_000
"""Maximum number of bad rows written to the quarantine file; all of them are counted."""


@dataclass(frozen=True)
class WindowPart:
    """A window of the training data, which is prepared by itself."""

    number: int
    """Counted from 0 over all epochs."""
    windows: int
    """Windows of an epoch."""
    blocks: tuple[Block, ...]
    curation: CuratedWindow | None
    """Its way through the stages; None without any."""
    before: tuple[int, int] = (0, 0)
    """Bad rows, and all rows, of the windows before."""


class Preparation:
    """One attempt: its two passes over the data, and their running totals.

    Args:
        recipe: the recipe.
        data: its sources.
        folder: receives the files of stages.
        attempt: receives the prepared files.
        run_tasks: runs the tasks.
        progress: receives a status after every finished task.
        part: the window of the training data; None for all of it.
        open_scorer: opens the reward model of a stage of data.curate.
        quarantine: (folder, name) of the list of bad rows; None: it lies in the attempt.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ResolvedData,
        folder: Folder,
        attempt: Folder,
        run_tasks: RunTasks,
        progress: Progress,
        part: WindowPart | None = None,
        open_scorer: OpenScorer | None = None,
        quarantine: tuple[Folder, str] | None = None,
    ) -> None:
        self._recipe = recipe
        self._bad_rows = quarantine or (attempt, QUARANTINE)
        self._open_scorer = open_scorer
        self._part = part
        self._is_later = part is not None and part.number > 0
        self._data = data
        self._folder = folder
        self._attempt = attempt
        self._run_tasks = run_tasks
        self._progress = progress
        self._rows = 0
        self._source_rows: Counter[tuple[str, int]] = Counter()
        self._documents: Counter[tuple[str, int]] = Counter()
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._lengths: Counter[int] = Counter()
        self._digests: dict[str, list[NDArray[np.uint64]]] = {"train": [], "eval": []}
        self._histogram = np.zeros(len(length_edges(recipe.row_length)) - 1, np.int64)
        self._parts: dict[str, list[Part]] = {"train": [], "eval": []}
        self._samples: list[tuple[int, Prompt]] = []
        self._quarantine: list[bytes] = []
        self._curated: Curated | None = None
        self._blocks: list[tuple[dict[str, Any], int]] = []

    @property
    def stages(self) -> list[str]:
        """Keys of the stages that all training rows went through, and that are kept."""
        if self._curated is None or self._part is not None:
            return []
        return list(self._curated.stages)

    def run(self, key: str) -> Manifest:
        """Run both passes, and write all files except the manifest, which is returned."""
        started = time.monotonic()
        for name in (TOKENS, "train", "eval"):
            (self._attempt / name).create()
        if self._recipe.data.is_curated:
            self._curate()
        self._tokenise()
        self._check_bad_rows(self._rows)
        self._check_not_empty()
        files = self._assemble(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
        samples_hash = self._write_samples()
        return self._manifest(key, files, samples_hash, started)

    def _check_bad_rows(self, rows: int) -> None:
        """Write the list of bad rows, and refuse too many of them."""
        folder, name = self._bad_rows
        if self._quarantine:
            folder.write(name, b"".join(self._quarantine))
        bad_before, rows_before = (0, 0) if self._part is None else self._part.before
        bad = bad_before + self._dropped[BAD_ROW]
        check_bad_rows(self._recipe, bad, rows_before + rows, folder, name)

    def _curate(self) -> None:
        def check(bad: Sequence[dict[str, Any]], count: int, rows: int) -> None:
            self._quarantine = [_line(entry) for entry in bad[:_QUARANTINED]]
            self._dropped[BAD_ROW] = count
            self._check_bad_rows(rows)

        self._curated = curate(
            *(self._recipe, self._data, self._folder, self._run_tasks, self._progress, check),
            window=None if self._part is None else self._part.curation,
            open_scorer=self._open_scorer,
        )
        self._dropped = Counter(dropped_by_stage(self._curated.funnel))

    def _weights(self) -> list[float]:
        """How often the rows of each training source are used."""
        rows = () if self._curated is None else self._curated.left_rows
        return weights_of(self._recipe, self._data, rows)

    def _items(self) -> list[tuple[ChunkItem, int]]:
        """Every chunk, with the number of its source within the split."""
        train, held_out = self._data.train, self._data.eval
        if self._part is None:
            weights = self._weights()
            blocks = [Block(number, chunk, weights[number]) for number, chunk in all_chunks(train)]
        else:
            blocks = list(self._part.blocks)
        items = [
            (_item(n, block, "train", train[block.source], self._curated), block.source)
            for n, block in enumerate(blocks)
        ]
        for number, chunk in () if self._is_later else all_chunks(held_out):
            source = held_out[number]
            block = Block(number, chunk, source.weight)
            items.append((_item(len(items), block, "eval", source, None), number))
        return items

    def _tokenise(self) -> None:
        items = self._items()
        task = TokeniseTask(
            render=_worker_settings(self._recipe),
            method=self._recipe.method.kind,
            columns=self._recipe.method.columns,
            attempt=self._attempt,
            holdout=self._recipe.data.held_out_share,
            max_row_bytes=self._recipe.data.max_row_bytes,
            with_samples=self._recipe.method.has_answers and not self._is_later,
            with_digests=bool(self._data.eval) and self._part is None,
        )
        lines = tokens = 0
        rows = {"train": 0, "eval": 0}
        chunks = [item for item, _ in items]
        for done, result in enumerate(self._run_tasks(task, chunks), start=1):
            split, source = result.item.split, items[done - 1][1]
            lines = 0 if result.item.chunk.start == 0 else lines
            if self._part is not None and result.bad_rows:
                lines = place_in_file(result.item.chunk, 0)
            self._collect(result, lines, rows[split])
            lines += result.lines
            rows[split] += result.rows
            if self._part is not None and split == "train":
                self._blocks.append((asdict(result.item.chunk), result.rows))
            self._source_rows[split, source] += result.rows
            self._documents[split, source] += result.documents["train"]
            tokens += sum(group.tokens for part in result.groups.values() for group in part)
            self._report("tokenise", done, len(items), tokens)

    def _collect(self, result: ChunkResult, lines_before: int, rows_before: int) -> None:
        self._rows += result.rows
        self._dropped.update(result.dropped)
        self._notes.update(result.notes)
        for name, rows in result.unused.items():
            if name != self._recipe.data.grouped_by:
                self._unused[name] += rows
        self._lengths.update(result.lengths)
        if result.digests is not None:
            self._digests[result.item.split].append(result.digests)
        self._histogram += result.histogram
        for split, groups in result.groups.items():
            self._parts[split].extend(Part(group, rows_before) for group in groups)
        missing = SAMPLES_KEPT - len(self._samples)
        self._samples += [(rows_before + row, prompt) for row, prompt in result.samples[:missing]]
        for bad in result.bad_rows[: _QUARANTINED - len(self._quarantine)]:
            entry = {
                "file": result.item.chunk.file.uri,
                "line": lines_before + bad.line,
                "reason": bad.reason,
                "row": bad.raw,
            }
            self._quarantine.append(_line(entry))

    def _assemble(self, seed: int) -> list[SequenceFile]:
        length = self._recipe.row_length
        task = AssembleTask(self._attempt, length, self._recipe.packs, seed)
        if self._is_later:
            self._parts["eval"] = []
        items = [
            item
            for split, parts in self._parts.items()
            for item in assemble_items(split, parts, length, self._recipe.packs)
        ]
        files: list[SequenceFile] = []
        for file in self._run_tasks(task, items):
            files.append(file)
            tokens = sum(file.tokens for file in files)
            self._report("pack", len(files), len(items), tokens)
        return files

    def _report(
        self, phase: Literal["tokenise", "pack"], done: int, total: int, tokens: int
    ) -> None:
        """Report the finished tasks of a phase, and the tokens that they wrote."""
        self._progress.advance(done, total)
        self._progress.status(f"preparing data: {phase} {done}/{total}, {count(tokens)} tokens")

    def _check_not_empty(self) -> None:
        data = self._recipe.data
        held_out = bool(data.eval) or data.holds_out
        if self._is_later:
            return
        is_all = self._part is None or self._part.windows == 1
        if not self._parts["train"] and is_all:
            remedy = "add data"
            if self._parts["eval"] and data.holds_out:
                remedy = f"{self._groups()}add data, or hold out a smaller share"
            elif self._dropped["overlong"]:
                remedy = "raise data.max_length, or add data"
            elif any(source.weight < 1 for source in self._data.train):
                remedy = "raise the weight of a source, of whose rows it takes a share, or add data"
            raise InputError(
                f"data.train: no sequence is left to train on: {self._summary()}; {remedy}"
            )
        if held_out and not self._parts["eval"]:
            setting, remedy = "data.eval", "add data"
            if not data.eval:
                setting = f"data.holdout {data.held_out_share:g}"
                remedy = f"{self._groups()}add data, or hold out a larger share"
            raise InputError(
                f"{setting}: no sequence is left to evaluate on: {self._summary()}; {remedy}"
            )

    def _groups(self) -> str:
        """Why a share may hold out all rows, or none."""
        if isinstance(self._recipe.data.holdout, float):
            return ""
        return "rows that are alike or of one group stay together, so many groups are needed; "

    def _summary(self) -> str:
        """The number of rows read, and of rows dropped for each reason."""
        dropped = ", ".join(f"{reason} {count}" for reason, count in self._dropped.items())
        longest, available = self._recipe.data.max_length, self._recipe.row_length
        limit = f"data.max_length is {longest}"
        if available < longest:
            limit += f", which leaves {available} tokens for a prompt"
        return f"{self._rows} rows read, dropped: {dropped or 'none'}" + (
            f" ({limit})" if self._dropped["overlong"] else ""
        )

    def _write_samples(self) -> str | None:
        """Write samples.parquet; returns its hash, or None if there are no samples."""
        if not self._samples:
            return None
        columns = {
            "row": [row for row, _ in self._samples],
            "prompt": [prompt.text for _, prompt in self._samples],
            "reference": [prompt.reference for _, prompt in self._samples],
            "prompt_ids": [prompt.input_ids for _, prompt in self._samples],
            "asked": [prompt.asked for _, prompt in self._samples],
        }
        return write_hashed(self._attempt, SAMPLES, pa.table(columns, schema=SAMPLE_SCHEMA))

    def _manifest(
        self, key: str, files: list[SequenceFile], samples_hash: str | None, started: float
    ) -> Manifest:
        edges = length_edges(self._recipe.row_length)
        splits = {
            split: split_of(
                [file for file in files if file.split == split],
                self._recipe.row_length * self._recipe.method.sequences_per_row,
            )
            for split in self._parts
        }
        train = splits["train"] or Split((), (), (), 0, 0, 0, 0, self._recipe.row_length)
        return Manifest(
            fingerprint=key,
            attempt=self._attempt.name,
            train=train,
            eval=splits["eval"],
            rows_read=self._rows,
            dropped=dict(self._dropped),
            notes=dict(self._notes),
            unused=dict(self._unused.most_common()),
            in_train_too=(
                count_common(self._digests["train"], self._digests["eval"])
                if self._data.eval and self._part is None
                else None
            ),
            length_histogram=Histogram(tuple(map(int, edges)), tuple(map(int, self._histogram))),
            length_quantiles=quantiles(
                self._lengths,
                self._dropped[OVERLONG] * self._recipe.method.sequences_per_row,
            ),
            sources=tuple(
                SourceSummary(
                    source.path,
                    split,
                    source.format,
                    len(source.files),
                    source.bytes,
                    self._source_rows[split, n],
                    source.commit,
                    self._documents[split, n],
                    content_of(source, split == "eval" or self._part is None),
                )
                for split, sources in (("train", self._data.train), ("eval", self._data.eval))
                for n, source in enumerate(sources)
            ),
            samples=len(self._samples),
            samples_hash=samples_hash,
            max_length=self._recipe.row_length,
            packing=self._recipe.packs,
            funnel=() if self._curated is None else self._curated.funnel,
            windows=None if self._part is None else self._part.windows,
            blocks=tuple(self._blocks),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started, 3),
        )


def _worker_settings(recipe: Recipe) -> RenderSettings:
    """Settings with which every worker loads the same tokenizer as the fingerprint."""
    settings = replace(RenderSettings.of(recipe), rows=embedding_rows(recipe.model))
    if Path(recipe.model.base).is_absolute():
        return settings
    snapshot = model_folder(recipe.model)
    assert snapshot is not None
    return replace(settings, revision=snapshot.name)


def _item(
    number: int, block: Block, split: str, source: ResolvedSource, curated: Curated | None
) -> ChunkItem:
    item = ChunkItem(number, block.chunk, source.format, split, block.weight, source.changes)
    return item if curated is None else replace(item, curated=_curated_chunk(curated, number))


def _curated_chunk(curated: Curated, number: int) -> CuratedChunk:
    counts = curated.counts[number]
    return CuratedChunk(curated.rows_of(number), curated.held, counts.rows, counts.lines)


def _line(entry: dict[str, Any]) -> bytes:
    """A line of the quarantine."""
    return json.dumps(entry).encode() + b"\n"


def check_bad_rows(
    recipe: Recipe, bad: int, rows: int, folder: Folder, name: str = QUARANTINE
) -> None:
    """Refuse too many rows that cannot be used.

    Args:
        recipe: the recipe.
        bad: their number.
        rows: that of all rows.
        folder: of the list of them.
        name: the list's file.

    Raises:
        InputError: there are more than the recipe allows.
    """
    limit = recipe.data.max_bad_rows
    if bad <= limit * rows:
        return
    first = _first_bad_rows(folder, name)
    raise InputError(
        f"data.max_bad_rows allows {limit:.1%}, and {bad} of {rows} rows ({bad / rows:.1%}) cannot "
        f"be used; correct them, or raise the limit. The first ones:\n{first}\n"
        f"All of them: {folder}/{name}"
    )


def _first_bad_rows(folder: Folder, name: str) -> str:
    """The first rows of the quarantine; the file may have been changed since it was written."""
    try:
        first = [json.loads(line) for line in folder.read(name).splitlines()[:3]]
        lines = [f"{row['file']}:{row['line']}: {row['reason']}" for row in first]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"  (the list is damaged: {one_line(str(error))})"
    return "\n".join(f"  {one_line(line)}" for line in lines)
