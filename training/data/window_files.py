"""What the driver, which prepares windows of streamed data, and the workers, which train on them,
say to each other through the run's folder.

<run>/windows/
    counts.json         the driver: sequences of each window so far, and what they add up to
    signs.json          the driver: a number that grows while it works
    failed.json         the driver: why it cannot go on
    position.json       worker 0: the first sequence that is still needed
    000012/             window 12, as a prepared data set; deleted when it is passed

A window is a function of data, recipe and seed. So what is lost is made again, and counts.json only
saves that: without it, a resumed run would prepare all earlier windows to know where it is.
"""

import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from ..common.storage import Folder
from .prepared import Manifest

WINDOWS_FOLDER = "windows"
"""Folder of the windows, in a run's folder."""
COUNTS, SIGNS, FAILED, POSITION = "counts.json", "signs.json", "failed.json", "position.json"


@dataclass
class WindowCounts:
    """What is known of the windows so far, from the first one on."""

    prepared: str
    """Name of the prepared data set that holds the first window."""
    sequences: list[int] = field(default_factory=list)
    """Number of sequences in each window."""
    rows_read: int = 0
    """Also for evaluation: those that `dropped` counts."""
    rows: int = 0
    """Rows for training."""
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped rows by the reason."""
    sources: dict[str, int] = field(default_factory=dict)
    """Number of documents by source."""

    @property
    def ends(self) -> list[int]:
        """Global position behind the last sequence of each window."""
        return list(accumulate(self.sequences))

    def add(self, manifest: Manifest) -> None:
        """Add the next window."""
        self.sequences.append(manifest.train.sequences)
        self.rows_read += manifest.rows_read
        self.rows += sum(source.rows for source in manifest.sources if source.split == "train")
        self.documents += manifest.train.documents
        self.tokens += manifest.train.tokens
        for reason, rows in manifest.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + rows
        for source in manifest.sources:
            if source.split == "train":
                before = self.sources.get(source.path, 0)
                self.sources[source.path] = before + source.documents

    def summary(self) -> dict[str, Any]:
        """What the windows add up to, for run.json."""
        return {
            "windows": len(self.sequences),
            "sequences": sum(self.sequences),
            "rows": self.rows,
            "documents": self.documents,
            "tokens": self.tokens,
            "dropped": self.dropped,
            "sources": self.sources,
        }

    def write(self, folder: Folder) -> None:
        folder.write(COUNTS, json.dumps(asdict(self)).encode())


def read_counts(folder: Folder) -> WindowCounts | None:
    """The counts in a folder; None if there are none, or they are damaged."""
    values = read_json(folder, COUNTS)
    try:
        return None if values is None else WindowCounts(**values)
    except TypeError:
        return None


def window_name(number: int) -> str:
    """The folder of a window."""
    return f"{number:06d}"


def is_window(name: str) -> bool:
    """True if it is the name of a window's folder."""
    return name.isdecimal() and len(name) >= len(window_name(0))


def read_json(folder: Folder, name: str) -> dict[str, Any] | None:
    """An object that the other side wrote; None if there is none, or half of one."""
    try:
        values = json.loads(folder.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_json(folder: Folder, name: str, **values: Any) -> None:
    folder.write(name, json.dumps(values).encode())
