"""Data preparation: read, normalise, tokenise, pack, and store the result by its fingerprint."""

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs as pafs

from ..common.errors import InputError, RunError
from ..common.formatting import count, one_line
from ..common.progress import SILENT, Progress
from ..common.storage import Folder
from ..config.model_folder import model_folder
from ..config.recipe import Recipe
from ..config.weight_checks import embedding_rows
from .assembling import AssembleTask, Part, SequenceFile, assemble_items, split_of
from .curation.curate import Curated, curate, dropped_by_stage
from .curation.funnel import BAD_ROW
from .curation.mixing import weights_of
from .curation.scoring import OpenScorer
from .fingerprint import fingerprint
from .prepared import (
    QUARANTINE,
    SAMPLE_SCHEMA,
    SAMPLES,
    STAGES_FILE,
    DamagedDataError,
    Histogram,
    Manifest,
    Prepared,
    SourceSummary,
    open_prepared,
    publish,
    remarks,
    write_hashed,
)
from .render_settings import RenderSettings
from .rendering import OVERLONG, Prompt
from .resolve import ResolvedData, resolve_data
from .row_facts import count_common, quantiles
from .sources import plan_chunks
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

_STALE_SECONDS = 24 * 3600
_HASHED_BYTES = 64 * 2**20
"""Sources up to this size are hashed in a moment."""
_QUARANTINED = 10_000
"""Maximum number of bad rows written to the quarantine file; all of them are counted."""


def prepare(
    recipe: Recipe,
    folder: Folder,
    run_tasks: RunTasks,
    progress: Progress = SILENT,
    open_scorer: OpenScorer | None = None,
) -> Prepared:
    """Prepare a recipe's data, or return it if it is prepared already and not known to be damaged.

    Each attempt writes into its own folder, and publishes it by writing the manifest that names
    this folder. So files of a killed process are never read, and if two processes prepare the same
    data, one result is kept.

    Args:
        recipe: the recipe, its paths absolute.
        folder: <storage>/prepared.
        run_tasks: runs the tasks, in this process or on Ray.
        progress: receives a status after every finished task.
        open_scorer: opens the reward model of a stage of data.curate.

    Raises:
        InputError: sources or rows are wrong, too many rows are bad, or no sequence is left.
        RunError: the storage is full, or cannot be written to.
    """
    data = resolve_data(recipe)
    key = fingerprint(recipe, data)
    home = folder / key
    with storage_errors(folder):
        home.touch()
        prepared = _opened(home, progress)
        if prepared is None:
            attempt = (home / uuid.uuid4().hex).create()
            work = _Preparation(recipe, data, folder, attempt, run_tasks, progress, open_scorer)
            prepared = _run_and_publish(work, key, home, attempt)
    manifest = prepared.manifest
    for remark in remarks(manifest.summary()):
        progress.status(f"data: {remark}")
    with suppress(OSError):  # the data can be used without
        _remove_stale(home, manifest.attempt)
    _check_bad_rows(recipe, manifest.dropped.get(BAD_ROW, 0), manifest.rows_read, home)
    return prepared


def _opened(home: Folder, progress: Progress) -> Prepared | None:
    """The finished data set in a folder; None if there is none, or it has to be prepared again."""
    try:
        return open_prepared(home)
    except DamagedDataError as error:
        progress.status(f"{error}; preparing the data again")
        return None


@contextmanager
def storage_errors(folder: Folder) -> Iterator[None]:
    """Turn errors of the storage into one message; those of source files are InputErrors."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write the prepared data: {one_line(str(error))}; make room or allow "
            "writing there, or set storage to another folder"
        ) from None


def find_prepared(recipe: Recipe, folder: Folder) -> Prepared | None:
    """The prepared data of a recipe in the folder <storage>/prepared, or None if there is none or
    it is damaged.

    Raises:
        InputError: sources are wrong.
    """
    data = resolve_data(recipe)
    try:
        if not _may_be_prepared(data, folder):
            return None
        return open_prepared(folder / fingerprint(recipe, data))
    except DamagedDataError:
        return None


def _may_be_prepared(data: ResolvedData, folder: Folder) -> bool:
    """False if no prepared data set comes from sources of these sizes: the content of large files
    takes long to hash."""
    sizes = [[source.bytes for source in sources] for sources in (data.train, data.eval)]
    if sum(map(sum, sizes)) < _HASHED_BYTES:
        return True
    for name in folder.names():
        try:
            prepared = open_prepared(folder / name)
        except DamagedDataError:
            continue
        if prepared is not None and sizes == [
            [source.bytes for source in prepared.manifest.sources if source.split == split]
            for split in ("train", "eval")
        ]:
            return True
    return False


def _run_and_publish(work: "_Preparation", key: str, home: Folder, attempt: Folder) -> Prepared:
    """Run an attempt and publish it; if another attempt was faster, return that one."""
    try:
        manifest = work.run(key)
        attempt.delete(TOKENS)
        if attempt.exists(QUARANTINE):
            home.write(QUARANTINE, attempt.read(QUARANTINE))
        if work.stages:
            home.write(STAGES_FILE, json.dumps(work.stages).encode())
    except BaseException:
        with suppress(OSError):  # the first error says more
            _clear(attempt, keep=QUARANTINE)
        raise
    # Outside the clause above, because a published attempt must not be cleared.
    prepared = publish(home, manifest)
    if prepared.manifest.attempt != manifest.attempt:
        attempt.delete()
    return prepared


class _Preparation:
    """One attempt: its two passes over the data, and their running totals."""

    def __init__(
        self,
        recipe: Recipe,
        data: ResolvedData,
        folder: Folder,
        attempt: Folder,
        run_tasks: RunTasks,
        progress: Progress,
        open_scorer: OpenScorer | None,
    ) -> None:
        self._recipe = recipe
        self._open_scorer = open_scorer
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

    @property
    def stages(self) -> list[str]:
        """Keys of the stages that the training rows went through."""
        return [] if self._curated is None else list(self._curated.stages)

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
        if self._quarantine:
            self._attempt.write(QUARANTINE, b"".join(self._quarantine))
        _check_bad_rows(self._recipe, self._dropped[BAD_ROW], rows, self._attempt)

    def _curate(self) -> None:
        def check(bad: Sequence[dict[str, Any]], count: int, rows: int) -> None:
            self._quarantine = [_line(entry) for entry in bad[:_QUARANTINED]]
            self._dropped[BAD_ROW] = count
            self._check_bad_rows(rows)

        self._curated = curate(
            *(self._recipe, self._data, self._folder, self._run_tasks, self._progress),
            check_bad=check,
            open_scorer=self._open_scorer,
        )
        self._dropped = Counter(dropped_by_stage(self._curated.funnel))

    def _weights(self) -> list[float]:
        """How often the rows of each training source are used."""
        rows = () if self._curated is None else self._curated.left_rows
        return weights_of(self._recipe, self._data, rows)

    def _tokenise(self) -> None:
        items = _chunk_items(self._data, self._weights(), self._curated)
        task = TokeniseTask(
            render=_worker_settings(self._recipe),
            method=self._recipe.method.kind,
            columns=self._recipe.method.columns,
            attempt=self._attempt,
            holdout=self._recipe.data.held_out_share,
            max_row_bytes=self._recipe.data.max_row_bytes,
            with_samples=self._recipe.method.has_answers,
            with_digests=bool(self._data.eval),
        )
        lines = tokens = 0
        rows = {"train": 0, "eval": 0}
        chunks = [item for item, _ in items]
        for done, result in enumerate(self._run_tasks(task, chunks), start=1):
            split, source = result.item.split, items[done - 1][1]
            lines = 0 if result.item.chunk.start == 0 else lines
            self._collect(result, lines, rows[split])
            lines += result.lines
            rows[split] += result.rows
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
        items = [
            item
            for split, parts in self._parts.items()
            for item in assemble_items(split, parts, length)
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
        if not self._parts["train"]:
            remedy = (
                "raise data.max_length, or add data" if self._dropped["overlong"] else "add data"
            )
            raise InputError(
                f"data.train: no sequence is left to train on: {self._summary()}; {remedy}"
            )
        if held_out and not self._parts["eval"]:
            setting = "data.eval" if data.eval else f"data.holdout {data.held_out_share:g}"
            raise InputError(
                f"{setting}: no sequence is left to evaluate on: {self._summary()}; "
                "add data, or hold out a larger share"
            )

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
        assert splits["train"] is not None
        return Manifest(
            fingerprint=key,
            attempt=self._attempt.name,
            train=splits["train"],
            eval=splits["eval"],
            rows_read=self._rows,
            dropped=dict(self._dropped),
            notes=dict(self._notes),
            unused=dict(self._unused.most_common()),
            in_train_too=(
                count_common(self._digests["train"], self._digests["eval"])
                if self._data.eval
                else None
            ),
            length_histogram=Histogram(tuple(map(int, edges)), tuple(map(int, self._histogram))),
            length_quantiles=quantiles(self._lengths, self._dropped[OVERLONG]),
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
                )
                for split, sources in (("train", self._data.train), ("eval", self._data.eval))
                for n, source in enumerate(sources)
            ),
            samples=len(self._samples),
            samples_hash=samples_hash,
            max_length=self._recipe.row_length,
            packing=self._recipe.packs,
            funnel=() if self._curated is None else self._curated.funnel,
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


def _chunk_items(
    data: ResolvedData, weights: Sequence[float], curated: Curated | None
) -> list[tuple[ChunkItem, int]]:
    """Every chunk of the sources, with the number of its source within the split.

    Args:
        data: the sources.
        weights: how often the rows of each training source are used.
        curated: the training rows, if they went through stages.
    """
    items: list[tuple[ChunkItem, int]] = []
    for split, sources in (("train", data.train), ("eval", data.eval)):
        for number, source in enumerate(sources):
            weight = weights[number] if split == "train" else source.weight
            for chunk in (chunk for file in source.files for chunk in plan_chunks(file)):
                item = ChunkItem(len(items), chunk, source.format, split, weight, source.changes)
                items.append((item, number))
    if curated is None:
        return items
    training = [
        (replace(item, curated=_curated_chunk(curated, n)), source)
        for n, (item, source) in enumerate(items[: len(curated.chunks)])
    ]
    return training + items[len(training) :]


def _curated_chunk(curated: Curated, number: int) -> CuratedChunk:
    counts = curated.counts[number]
    return CuratedChunk(curated.rows_of(number), curated.held, counts.rows, counts.lines)


def _line(entry: dict[str, Any]) -> bytes:
    """A line of the quarantine."""
    return json.dumps(entry).encode() + b"\n"


def _check_bad_rows(recipe: Recipe, bad: int, rows: int, folder: Folder) -> None:
    limit = recipe.data.max_bad_rows
    if bad <= limit * rows:
        return
    raise InputError(
        f"data.max_bad_rows allows {limit:.1%}, and {bad} of {rows} rows ({bad / rows:.1%}) cannot "
        f"be used; mend them, or raise the limit. The first ones:\n{_first_bad_rows(folder)}\n"
        f"All of them: {folder}/{QUARANTINE}"
    )


def _first_bad_rows(folder: Folder) -> str:
    """The first rows of the quarantine; the file may have been changed since it was written."""
    try:
        first = [json.loads(line) for line in folder.read(QUARANTINE).splitlines()[:3]]
        lines = [f"{row['file']}:{row['line']}: {row['reason']}" for row in first]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"  (the list is damaged: {one_line(str(error))})"
    return "\n".join(f"  {one_line(line)}" for line in lines)


def _clear(attempt: Folder, keep: str) -> None:
    """Delete a failed attempt's files except `keep`, its list of bad rows, for the user."""
    for name in attempt.names():
        if name != keep:
            attempt.delete(name)
    if not attempt.exists(keep):
        attempt.delete()


def _remove_stale(home: Folder, current: str) -> None:
    """Delete attempts of killed processes, if their files are older than a day."""
    entries = home.filesystem.get_file_info(pafs.FileSelector(home.path))
    folders = [info for info in entries if info.type == pafs.FileType.Directory]
    for name in (info.base_name for info in folders if info.base_name != current):
        inside = pafs.FileSelector((home / name).path, recursive=True, allow_not_found=True)
        times = [info.mtime_ns or 0 for info in home.filesystem.get_file_info(inside)]
        if times and max(times) / 1e9 < time.time() - _STALE_SECONDS:
            home.delete(name)
