"""The files of a prepared data set.

<storage>/prepared/<fingerprint>/
    manifest.json            written last; names the attempt whose files are valid
    quarantine.jsonl         rows that cannot be used
    stages.json              keys of the stages of data.curate that its rows went through
    <attempt>/train/*.parquet, eval/*.parquet, samples.parquet

Parquet that lost or changed a bit often reads without an error, as other tokens. So the manifest
holds a hash of every file and of itself, and a process compares a file with its hash before it
first reads it. A damaged data set is prepared again.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..common import formatting
from ..common.errors import InputError, RunError
from ..common.storage import Folder
from .row_facts import describe_unused

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
STAGES_FILE = "stages.json"
SAMPLES = "samples.parquet"
ROW_GROUP = 64
"""Sequences in a row group, the unit that a reader loads."""
ONLY_END_TRAINED, NO_END_TRAINED, CUT = "only_end_trained", "no_end_trained", "cut"
ANSWER_OVERLONG, REPEATED = "answer_overlong", "repeated_tokens"
_NOTES = {
    ONLY_END_TRAINED: "answers of which only the end is trained",
    CUT: "rows longer than data.max_length, which were cut or split",
    NO_END_TRAINED: "answers whose end is not trained, so that the model does not learn to stop",
    ANSWER_OVERLONG: "answers left out, as the conversation up to them is too long",
    REPEATED: "repeated tokens: the chat template rewrites earlier turns, so each answer is an "
    "example of its own",
}
STREAMED = (
    "the data streams: figures of rows are those of the first window; not counted before the "
    "training: all rows, bad rows, and held-out rows that are trained on, too"
)
"""What `data.prepare: streaming` gives up."""
_DIGEST = "digest"
"""The manifest's key for the hash of its other content."""
_ASIDE = ".damaged"
_BLOCK = 2**20

SEQUENCE_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("trainable", pa.list_(pa.bool_())),
        ("rows", pa.list_(pa.int64())),
        ("extra", pa.string()),
    ]
)
"""A row is a sequence: its tokens, its documents' lengths, which tokens are trained, and each
document's row number within the split, in the order of sources, files and rows. A row may also be
a document of several texts, such as a pair. `extra` is further input of the method, as JSON."""

SAMPLE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("asked", pa.string()),
    ]
)


class DamagedDataError(RunError):
    """A file of a prepared data set is missing, or is not as it was written."""


@dataclass(frozen=True)
class Split:
    """The sequences for training, or those for evaluation."""

    files: tuple[str, ...]
    """Parquet files, relative to the attempt's folder."""
    hashes: tuple[str, ...]
    """The hash of each file's content."""
    row_groups: tuple[tuple[int, ...], ...]
    """Number of sequences in each row group of each file."""
    sequences: int
    documents: int
    tokens: int
    trainable_tokens: int
    capacity: int
    """Tokens that a sequence can hold."""

    @property
    def fill(self) -> float:
        """Share of the sequences' capacity that tokens fill, in [0, 1]."""
        return self.tokens / max(1, self.sequences * self.capacity)


@dataclass(frozen=True)
class Histogram:
    """Histogram of the documents' lengths in tokens."""

    edges: tuple[int, ...]
    """Bin i counts lengths in [edges[i], edges[i + 1]); the last bin includes its upper edge."""
    counts: tuple[int, ...]
    """Number of documents in each bin; one fewer than edges."""


@dataclass(frozen=True)
class SourceSummary:
    """The files and rows read from one source."""

    path: str
    split: str
    """train or eval."""
    format: str
    files: int
    bytes: int
    """Size of the files, as stored."""
    rows: int
    commit: str | None = None
    """The commit of a data set of the hub."""
    documents: int = 0
    """Documents for training that come from it, copies included."""
    content: str | None = None
    """A hash of what identifies its files; None in data of an older finray."""


@dataclass(frozen=True)
class Manifest:
    """The facts about a prepared data set, as stored in manifest.json."""

    fingerprint: str
    attempt: str
    """Name of the attempt's folder, which contains the files."""
    train: Split
    eval: Split | None
    rows_read: int
    dropped: dict[str, int]
    """Number of dropped rows for each reason: bad_row, overlong, …"""
    notes: dict[str, int]
    """Number of answers of which ONLY_END_TRAINED, NO_END_TRAINED or ANSWER_OVERLONG is true, of
    REPEATED tokens, and of rows that were CUT."""
    unused: dict[str, int]
    """Number of rows with a field that nothing uses, by its name."""
    in_train_too: int | None
    """Number of rows of data.eval that stand in data.train, too; None without data.eval."""
    length_histogram: Histogram
    length_quantiles: dict[str, int | None]
    """The length up to which a share of all texts goes, by the share; None: more than max_length,
    as rows that were dropped for their length."""
    sources: tuple[SourceSummary, ...]
    samples: int
    """Number of held-out prompts in samples.parquet."""
    samples_hash: str | None
    """The hash of samples.parquet; None without held-out prompts."""
    max_length: int
    packing: bool
    created_at: str
    """UTC, ISO 8601."""
    seconds: float
    """Duration of the preparation."""
    funnel: tuple[dict[str, Any], ...] = ()
    """What each stage of data.curate dropped, and why, with samples; empty without any."""
    windows: int | None = None
    """Windows of an epoch, of which this is one; None for all of the data."""
    blocks: tuple[tuple[dict[str, Any], int], ...] = ()
    """The parts of files that a window holds, each with its number of rows, in the order of the
    row numbers."""

    @property
    def longest(self) -> int:
        """A bound of the tokens of a document, by its longest text; other windows may have longer
        ones."""
        if (self.windows or 1) > 1:
            return self.max_length
        return min(self.length_quantiles.get("1") or self.max_length, self.max_length)

    def summary(self) -> dict[str, Any]:
        """The manifest for people: without files and hashes, with each split's fill."""
        summary = asdict(self)
        del summary["samples_hash"], summary["blocks"]
        for name, split in (("train", self.train), ("eval", self.eval)):
            if split is not None:
                for key in ("files", "hashes", "row_groups"):
                    del summary[name][key]
                summary[name]["fill"] = round(split.fill, 4)
        return summary

    def to_json(self) -> bytes:
        values = asdict(self)
        return json.dumps({**values, _DIGEST: _digest(values)}, indent=2).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        """Read a manifest.

        Raises:
            ValueError: it is not a manifest of this version, or not as it was written.
        """
        values: Any = json.loads(content)
        if not isinstance(values, dict) or values.pop(_DIGEST, None) != _digest(values):
            raise ValueError("it is not as it was written")
        values["train"] = _split(values["train"])
        values["eval"] = _split(values["eval"]) if values["eval"] else None
        values["length_histogram"] = Histogram(
            tuple(values["length_histogram"]["edges"]), tuple(values["length_histogram"]["counts"])
        )
        values["funnel"] = tuple(values.get("funnel", ()))
        values["blocks"] = tuple((chunk, rows) for chunk, rows in values.get("blocks", ()))
        values["sources"] = tuple(SourceSummary(**source) for source in values["sources"])
        return cls(**values)


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a user should see of the rows before training, as text.

    Args:
        summary: as `Manifest.summary` returns it; also that of a run of an older finray.
    """
    notes = summary.get("notes") or {}
    lines = [f"{formatting.count(n)} {_NOTES.get(note, note)}" for note, n in notes.items()]
    if summary.get("in_train_too"):
        rows = formatting.count(summary["in_train_too"])
        lines.append(f"{rows} held-out rows are in the training data, too")
    if summary.get("windows"):
        lines.append(STREAMED)
    return [*lines, *filter(None, [describe_unused(summary.get("unused") or {})])]


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference answer."""

    row: int
    """Row number within the evaluation split."""
    prompt: str
    reference: str
    prompt_ids: list[int]
    asked: str
    """As JSON, `prompt` (text or messages), `columns` (of the row, for functions of the user), and
    `calls` (of the reference, where there are tools)."""


@dataclass(frozen=True)
class Prepared:
    """A complete prepared data set."""

    folder: Folder
    """<storage>/prepared/<fingerprint>."""
    manifest: Manifest

    @property
    def files(self) -> Folder:
        """The attempt's folder, which contains the splits' files."""
        return self.folder / self.manifest.attempt

    def samples(self, count: int) -> list[Sample]:
        """At most `count` held-out prompts, in the order of their rows."""
        if self.manifest.samples == 0:
            return []
        assert self.manifest.samples_hash is not None
        check_file(self.files, SAMPLES, self.manifest.samples_hash)
        table = pq.read_table(self.files.file(SAMPLES), filesystem=self.files.filesystem)
        return [Sample(**row) for row in table.slice(0, count).to_pylist()]


def open_prepared(folder: Folder) -> Prepared | None:
    """The finished data set in a folder, or None if there is none.

    Raises:
        DamagedDataError: the manifest is damaged, or names files that no longer exist.
        InputError: the folder cannot be read.
    """
    try:
        content = folder.read(MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = formatting.one_line(str(error))
        raise InputError(
            f"{folder}: cannot read the prepared data: {reason}; make it a folder that this user "
            "can read, or set storage to another folder"
        ) from None
    try:
        manifest = Manifest.from_json(content)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedDataError(f"{folder}/{MANIFEST}: damaged ({error})") from None
    prepared = Prepared(folder, manifest)
    present = set(prepared.files.files())
    splits = [manifest.train, manifest.eval]
    files = [file for split in splits if split for file in split.files]
    files += [SAMPLES] if manifest.samples else []
    for file in files:
        if file not in present:
            raise _missing(prepared.files, file)
    return prepared


def check_file(folder: Folder, name: str, expected: str) -> None:
    """Compare a file of a data set with its hash, when this process first reads it.

    A damaged file is renamed, so that the next start misses it and prepares the data again.

    Args:
        folder: the attempt's folder.
        name: the file, relative to it.
        expected: the hash of its content.

    Raises:
        DamagedDataError: the file is missing or damaged.
    """
    try:
        _check_once(folder, name, expected)
    except FileNotFoundError:
        raise _missing(folder, name) from None


def forget_checks() -> None:
    """Let `check_file` compare every file again."""
    _check_once.cache_clear()


@cache
def _check_once(folder: Folder, name: str, expected: str) -> None:
    # A second look: what a network or a cache damaged is not damaged in the storage.
    if any(_hash_of_file(folder, name) == expected for _ in range(2)):
        return
    raise DamagedDataError(
        f"{folder}/{name}: damaged: this file of the prepared data is not as it was written"
        f"{_move_aside(folder, name)}"
    )


def _move_aside(folder: Folder, name: str) -> str:
    """Rename a damaged file; returns how to go on if that is not possible."""
    path = folder.file(name)
    try:
        folder.filesystem.move(path, f"{path}{_ASIDE}")
    except FileNotFoundError:  # another worker did it
        return ""
    except OSError as error:
        return f", and it cannot be renamed ({error}); delete it to prepare the data again"
    return ""


def _missing(folder: Folder, name: str) -> DamagedDataError:
    return DamagedDataError(f"{folder}/{name}: this file of the prepared data is missing")


def _hash_of_file(folder: Folder, name: str) -> str:
    digest = _hasher()
    with folder.filesystem.open_input_stream(folder.file(name)) as stream:
        while block := stream.read_buffer(_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


def _hasher() -> Any:
    return hashlib.sha256()


def write_hashed(folder: Folder, name: str, table: pa.Table, **options: Any) -> str:
    """Write a Parquet file of a data set; returns the hash of its content.

    Args:
        folder: the attempt's folder.
        name: the file, relative to it.
        table: its rows.
        options: of pyarrow's `write_table`.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    content = sink.getvalue()
    with folder.filesystem.open_output_stream(folder.file(name)) as stream:
        stream.write(content)
    digest = _hasher()
    digest.update(content)
    return str(digest.hexdigest())


def publish(folder: Folder, manifest: Manifest) -> Prepared:
    """Make an attempt the folder's data set, unless another attempt was faster.

    On a disk exactly one attempt wins. An object store has no exclusive write: of two attempts
    that finish at the same moment, the last one wins; so it is where a damaged set is replaced.

    Returns:
        The data set of the attempt that won.
    """
    try:
        winner, is_damaged = open_prepared(folder), False
    except DamagedDataError:
        winner, is_damaged = None, True
    if winner is not None:
        return winner
    if folder.local is None or is_damaged:
        folder.write(MANIFEST, manifest.to_json())
        return Prepared(folder, manifest)
    draft = f"{MANIFEST}.{uuid.uuid4().hex}"
    folder.write(draft, manifest.to_json())
    try:
        os.link(folder.local / draft, folder.local / MANIFEST)
    except FileExistsError:
        winner = open_prepared(folder)
        assert winner is not None
        return winner
    finally:
        folder.delete(draft)
    return Prepared(folder, manifest)


def _digest(values: dict[str, Any]) -> str:
    """The hash of a manifest's content."""
    digest = _hasher()
    digest.update(json.dumps(values, sort_keys=True).encode())
    return str(digest.hexdigest())


def _split(values: dict[str, Any]) -> Split:
    return Split(
        **{
            **values,
            "files": tuple(values["files"]),
            "hashes": tuple(values["hashes"]),
            "row_groups": tuple(map(tuple, values["row_groups"])),
        }
    )
