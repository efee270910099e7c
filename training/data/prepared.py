"""The files of a prepared data set.

<storage>/prepared/<fingerprint>/
    manifest.json            written last; names the attempt whose files are valid
    quarantine.jsonl         rows that cannot be used
    <attempt>/train/*.parquet, eval/*.parquet, samples.parquet
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..common.errors import InputError
from ..common.storage import Folder

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
SAMPLES = "samples.parquet"
ROW_GROUP = 64
"""Sequences in a row group, the unit that a reader loads."""

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
    ]
)


@dataclass(frozen=True)
class Split:
    """The sequences for training, or those for evaluation."""

    files: tuple[str, ...]
    """Parquet files, relative to the attempt's folder."""
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
        return self.tokens / (self.sequences * self.capacity)


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
    rows: int


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
    length_histogram: Histogram
    sources: tuple[SourceSummary, ...]
    samples: int
    """Number of held-out prompts in samples.parquet."""
    max_length: int
    packing: bool
    created_at: str
    """UTC, ISO 8601."""
    seconds: float
    """Duration of the preparation."""

    def summary(self) -> dict[str, Any]:
        """The manifest for people: without the lists of files, with each split's fill."""
        summary = asdict(self)
        for name, split in (("train", self.train), ("eval", self.eval)):
            if split is not None:
                del summary[name]["files"], summary[name]["row_groups"]
                summary[name]["fill"] = round(split.fill, 4)
        return summary

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        values: dict[str, Any] = json.loads(content)
        values["train"] = _split(values["train"])
        values["eval"] = _split(values["eval"]) if values["eval"] else None
        values["length_histogram"] = Histogram(
            tuple(values["length_histogram"]["edges"]), tuple(values["length_histogram"]["counts"])
        )
        values["sources"] = tuple(SourceSummary(**source) for source in values["sources"])
        return cls(**values)


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with its reference answer."""

    row: int
    """Row number within the evaluation split."""
    prompt: str
    reference: str
    prompt_ids: list[int]


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
        table = pq.read_table(self.files.file(SAMPLES), filesystem=self.files.filesystem)
        return [Sample(**row) for row in table.slice(0, count).to_pylist()]


def open_prepared(folder: Folder) -> Prepared | None:
    """The finished data set in a folder, or None if there is none.

    Raises:
        InputError: the manifest is damaged, or names files that no longer exist.
    """
    try:
        content = folder.read(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/{MANIFEST}: damaged ({error}); delete {folder} to prepare the data again"
        ) from None
    prepared = Prepared(folder, manifest)
    present = set(prepared.files.files())
    splits = [manifest.train, manifest.eval]
    missing = [file for split in splits if split for file in split.files if file not in present]
    if missing:
        raise InputError(
            f"{prepared.files}/{missing[0]}: this file of the prepared data is missing; "
            f"delete {folder} to prepare the data again"
        )
    return prepared


def publish(folder: Folder, manifest: Manifest) -> Prepared:
    """Make an attempt the folder's data set, unless another attempt was faster.

    On a disk exactly one attempt wins. An object store has no exclusive write: of two attempts
    that finish at the same moment, the last one wins.

    Returns:
        The data set of the attempt that won.
    """
    if folder.local is None:
        if (winner := open_prepared(folder)) is not None:
            return winner
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


def _split(values: dict[str, Any]) -> Split:
    return Split(
        **{
            **values,
            "files": tuple(values["files"]),
            "row_groups": tuple(map(tuple, values["row_groups"])),
        }
    )
