"""What a prepared data set is on disk.

<storage>/prepared/<fingerprint>/
    manifest.json            written last; names the attempt whose files are valid
    quarantine.jsonl         rows that could not be used
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
"""Sequences in a row group: what a reader loads at a time."""

SEQUENCE_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("trainable", pa.list_(pa.bool_())),
        ("rows", pa.list_(pa.int64())),
        ("extra", pa.string()),
    ]
)
"""A row is a sequence: its tokens, its documents' lengths, which tokens bear loss, and each
document's row number within the split, in the order of sources, files and rows. A row may be one
document of several texts, such as a pair's; `extra` is what else its method wants, as JSON."""

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
    """The sequences of training, or of evaluation."""

    files: tuple[str, ...]
    """Parquet files, relative to the attempt's folder."""
    row_groups: tuple[tuple[int, ...], ...]
    """Sequences in each row group of each file."""
    sequences: int
    documents: int
    tokens: int
    trainable_tokens: int
    capacity: int
    """Tokens that a sequence can hold."""

    @property
    def fill(self) -> float:
        """Share of the sequences' room that tokens take."""
        return self.tokens / (self.sequences * self.capacity)


@dataclass(frozen=True)
class Histogram:
    """Lengths of the documents in tokens."""

    edges: tuple[int, ...]
    """Bin i counts lengths in [edges[i], edges[i + 1]); the last bin has its upper edge too."""
    counts: tuple[int, ...]
    """One fewer than edges."""


@dataclass(frozen=True)
class SourceSummary:
    """What was read of one source."""

    path: str
    split: str
    """train or eval."""
    format: str
    files: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a prepared data set."""

    fingerprint: str
    attempt: str
    """Name of the folder that holds the files."""
    train: Split
    eval: Split | None
    rows_read: int
    dropped: dict[str, int]
    """Rows by the reason for which they are not in the data: bad_row, overlong, …"""
    length_histogram: Histogram
    sources: tuple[SourceSummary, ...]
    samples: int
    """Held-out prompts in samples.parquet."""
    max_length: int
    packing: bool
    created_at: str
    """UTC, ISO 8601."""
    seconds: float
    """Time the preparation took."""

    def summary(self) -> dict[str, Any]:
        """The manifest without the lists of files, and with each split's fill: for people."""
        told = asdict(self)
        for name, split in (("train", self.train), ("eval", self.eval)):
            if split is not None:
                del told[name]["files"], told[name]["row_groups"]
                told[name]["fill"] = round(split.fill, 4)
        return told

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
        """The folder that the splits' files are relative to."""
        return self.folder / self.manifest.attempt

    def samples(self, count: int) -> list[Sample]:
        """At most `count` held-out prompts, in the order of their rows."""
        if self.manifest.samples == 0:
            return []
        table = pq.read_table(self.files.file(SAMPLES), filesystem=self.files.filesystem)
        return [Sample(**row) for row in table.slice(0, count).to_pylist()]


def open_prepared(folder: Folder) -> Prepared | None:
    """The finished data set in a folder, or None where there is none.

    Raises:
        InputError: where the manifest is damaged or names files that are gone.
    """
    try:
        content = folder.read(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/{MANIFEST}: damaged ({error}); delete {folder}, and it is prepared again"
        ) from None
    prepared = Prepared(folder, manifest)
    present = set(prepared.files.files())
    splits = [manifest.train, manifest.eval]
    missing = [file for split in splits if split for file in split.files if file not in present]
    if missing:
        raise InputError(
            f"{prepared.files}/{missing[0]}: the prepared data lacks this file; "
            f"delete {folder}, and it is prepared again"
        )
    return prepared


def publish(folder: Folder, manifest: Manifest) -> Prepared:
    """Make an attempt the folder's data set, unless another one was faster.

    On a disk exactly one attempt wins; an object store knows no exclusive write, and the last of
    two attempts that finish within the same moment wins.

    Returns:
        The data set that won.
    """
    if folder.local is None:
        if (other := open_prepared(folder)) is not None:
            return other
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
