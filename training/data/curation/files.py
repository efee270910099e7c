"""The files of a finished stage: of each chunk, which rows are left, and what changed rows say.

<storage>/prepared/stages/<key>/
    manifest.json       written last: what the stage counted
    000000.parquet      the rows of chunk 0 that are left, and their content if the stage writes it

A stage that only drops rows writes their numbers; their content is in the file of the last stage
before it that wrote rows. Parquet's pages have checksums.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs as pafs

from ...common.errors import RunError
from ...common.formatting import one_line
from ...common.storage import Folder
from ..rows import Row

STAGES = "stages"
"""The folder of all stages, beside the prepared data sets."""
MANIFEST = "manifest.json"
WORK = "work-"
"""Begins the name of a folder in which tasks hand something on; it is deleted at the end."""
_PART = ".part"
_STALE_SECONDS = 24 * 3600
_FACTS = b"finray"
_INDEX = ("index", pa.int64())
_SCHEMA = pa.schema([_INDEX])
_ROW_SCHEMA = pa.schema(
    [_INDEX, ("line", pa.int64()), ("row", pa.large_string()), ("group", pa.large_string())]
)
_SCORE_SCHEMA = pa.schema(
    [_INDEX, ("score", pa.float64()), ("content", pa.uint64()), ("characters", pa.int64())]
)
_HELD_SCHEMA = pa.schema([_INDEX, ("held", pa.bool_())])

Indices = NDArray[np.int64]
"""Numbers of rows within their chunk, ascending."""


@dataclass(frozen=True)
class StoredRow:
    """A row that a stage wrote."""

    index: int
    line: int
    row: Row
    group: str | None


@dataclass(frozen=True)
class ScoredRows:
    """Rows of a chunk with their scores."""

    index: Indices
    scores: NDArray[np.float64]
    contents: NDArray[np.uint64]
    """A number for each row's content, the same for equal rows."""
    characters: NDArray[np.int64]


def file_name(chunk: int) -> str:
    """A stage's file of a chunk."""
    return f"{chunk:06d}.parquet"


@dataclass
class StageFile:
    """Writes the file of a chunk; readers see it when it is complete.

    Args:
        folder: the stage's folder.
        chunk: the chunk's number.
        schema: what it has of each row: see `index_file`, `row_file` and `held_file`.
    """

    folder: Folder
    chunk: int
    schema: Any
    _writer: Any = None
    _name: str = field(default_factory=lambda: f".{uuid.uuid4().hex}{_PART}")

    def write(self, columns: Sequence[Any]) -> None:
        """Add rows: a column for each field of the schema."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self.folder.file(self._name),
                self.schema,
                filesystem=self.folder.filesystem,
                compression="lz4",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        arrays = [
            pa.array(column, kind.type) for column, kind in zip(columns, self.schema, strict=True)
        ]
        self._writer.write_table(pa.table(arrays, schema=self.schema))

    def close(self, facts: dict[str, Any]) -> None:
        """Complete the file; `facts` are kept in it."""
        if self._writer is None:
            self.write([[] for _ in self.schema])
        self._writer.add_key_value_metadata({_FACTS: json.dumps(facts)})
        self._writer.close()
        self.folder.filesystem.move(
            self.folder.file(self._name), self.folder.file(file_name(self.chunk))
        )

    def abort(self) -> None:
        """Remove what is written of an incomplete file."""
        if self._writer is not None:
            with suppress(OSError):  # a full disk takes no end of it, either
                self._writer.close()
            self.folder.delete(self._name)

    @contextmanager
    def completing(self, facts: Callable[[], dict[str, Any]]) -> Iterator[Self]:
        """Write inside; completes the file with these facts then, or removes it if that fails."""
        try:
            yield self
            self.close(facts())
        except BaseException:
            self.abort()
            raise


def index_file(folder: Folder, chunk: int) -> StageFile:
    """A file of the rows that are left: index."""
    return StageFile(folder, chunk, _SCHEMA)


def row_file(folder: Folder, chunk: int) -> StageFile:
    """A file of rows with their content: index, line, row as JSON, group."""
    return StageFile(folder, chunk, _ROW_SCHEMA)


def held_file(folder: Folder, chunk: int) -> StageFile:
    """A file of the rows that are left, and whether each is held out: index, held."""
    return StageFile(folder, chunk, _HELD_SCHEMA)


def score_file(folder: Folder, chunk: int) -> StageFile:
    """A file of the rows that have a score: index, score, content, characters."""
    return StageFile(folder, chunk, _SCORE_SCHEMA)


def remove_leftovers(folder: Folder) -> None:
    """Delete what killed processes left in a stage's folder, if it is older than a day."""
    entries = folder.filesystem.get_file_info(pafs.FileSelector(folder.path))
    for info in entries:
        is_part = info.base_name.endswith(_PART) or info.base_name.startswith(WORK)
        if is_part and (info.mtime_ns or 0) / 1e9 < time.time() - _STALE_SECONDS:
            folder.delete(info.base_name)


def facts_of(folder: Folder, chunk: int) -> dict[str, Any] | None:
    """The facts in a chunk's file; None if there is none."""
    if not folder.exists(file_name(chunk)):
        return None
    with _opened(folder, chunk) as parquet:
        facts: dict[str, Any] = json.loads(parquet.metadata.metadata[_FACTS])
        return facts


def left_in(folder: Folder, chunk: int) -> Indices:
    """The rows of a chunk that a stage leaves."""
    with _opened(folder, chunk) as parquet:
        left: Indices = _checked(folder, chunk, parquet, ["index"])["index"].to_numpy()
        return left


def held_in(folder: Folder, chunk: int) -> dict[int, bool]:
    """Of each row that is left, whether it is held out."""
    with _opened(folder, chunk) as parquet:
        table = _checked(folder, chunk, parquet, ["index", "held"])
        return dict(zip(table["index"].to_pylist(), table["held"].to_pylist(), strict=True))


def scores_in(folder: Folder, chunk: int) -> ScoredRows:
    """The rows of a chunk that have a score."""
    with _opened(folder, chunk) as parquet:
        table = _checked(folder, chunk, parquet, _SCORE_SCHEMA.names)
        return ScoredRows(*(table[name].to_numpy() for name in _SCORE_SCHEMA.names))


@dataclass(frozen=True)
class StageRows:
    """Where the rows of a chunk are, after a stage."""

    folder: Folder
    """Folder that holds one folder per stage."""
    chunk: int
    rows: str
    """Key of the stage that wrote them."""
    left: str
    """Key of the last stage."""

    def __iter__(self) -> Iterator[StoredRow]:
        left = left_in(self.folder / self.left, self.chunk)
        with _opened(self.folder / self.rows, self.chunk) as parquet:
            for group in range(parquet.num_row_groups):
                table = _checked(self.folder / self.rows, self.chunk, parquet, None, group)
                index = table["index"].to_numpy()
                table = table.filter(pa.array(np.isin(index, left, assume_unique=True)))
                for index, line, row, of in zip(
                    *(table[name].to_pylist() for name in _ROW_SCHEMA.names), strict=True
                ):
                    yield StoredRow(index, line, json.loads(row), of)


def _opened(folder: Folder, chunk: int) -> Any:
    try:
        return pq.ParquetFile(
            folder.file(file_name(chunk)),
            filesystem=folder.filesystem,
            page_checksum_verification=True,
        )
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, chunk, error) from None


def _checked(
    folder: Folder, chunk: int, parquet: Any, columns: list[str] | None, group: int | None = None
) -> Any:
    try:
        if group is None:
            return parquet.read(columns=columns, use_threads=False)
        return parquet.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, chunk, error) from None


def _damaged(folder: Folder, chunk: int, error: Exception) -> RunError:
    """Forget the stage, so that the next start repeats it."""
    folder.delete(MANIFEST)
    folder.delete(file_name(chunk))
    return RunError(
        f"{folder}/{file_name(chunk)}: this file of a curation stage is missing or damaged "
        f"({one_line(str(error))}), and the stage is repeated at the next start; start again"
    )
