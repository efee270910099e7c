"""Finds data files below a path, and splits them into chunks that tasks read in parallel."""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ..common.errors import InputError, reason
from ..common.formatting import one_line
from ..common.storage import Folder

HUB = "hf://"
CHUNK_BYTES = 4 * 2**20
"""Bytes of JSON Lines (or of decompressed Parquet row groups) that one task reads."""

FileKind = Literal["lines", "array", "parquet", "arrow", "csv", "tsv", "text"]

_KINDS: dict[str, FileKind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".txt": "text",
}
MOST_ROWS = 2**62
"""More rows than any file has."""
_ARROW_FILE = b"ARROW1"
_COMPRESSIONS = (".gz", ".zst")
_BINARY = (".parquet", ".arrow")
_DESCRIPTIONS = frozenset(
    {
        "config.json",
        "dataset_dict.json",
        "dataset_info.json",
        "dataset_infos.json",
        "requirements.txt",
        "state.json",
    }
)
"""Files beside data that describe it."""
_EXPECTED = (
    "give a file, folder or glob of .jsonl, .ndjson, .json, .parquet, .arrow, .csv, .tsv or .txt "
    "files (text also as .gz or .zst)"
)
_BLOCK = 2**20
_DATA = re.compile(rb'(?:^\{|,)\s*"data"\s*:\s*\[')
Rows = tuple[int, int]
"""Rows [start, stop), counted from 0."""


@dataclass(frozen=True)
class SourceFile:
    """One data file of a source."""

    folder: str
    """URI or absolute path of the source's folder."""
    name: str
    """Path relative to `folder`."""
    size: int
    """Size in bytes, as stored."""
    modified_ns: int
    """Modification time, nanoseconds since 1970; 0 if the store does not provide it."""
    rows: Rows | None = None
    """The rows that are used; None: all."""
    content: str | None = None
    """What identifies its bytes, where `contents.identified` has looked."""

    @property
    def uri(self) -> str:
        """URI or absolute path of the file."""
        return f"{self.folder.rstrip('/')}/{self.name}"

    @property
    def place(self) -> str:
        """The file in messages: control characters in its name would change the terminal."""
        return one_line(self.uri)

    @property
    def is_local(self) -> bool:
        return Folder(self.folder).local is not None

    @property
    def real(self) -> str:
        """The file itself, where its path leads through links."""
        return os.path.realpath(Folder(self.folder).file(self.name)) if self.is_local else self.uri

    @property
    def is_compressed(self) -> bool:
        return self.name.endswith(_COMPRESSIONS)

    def open(self) -> Any:
        """The stored bytes as a pyarrow file with random access."""
        folder = Folder(self.folder)
        return folder.filesystem.open_input_file(folder.file(self.name))

    def open_text(self) -> Any:
        """The decompressed bytes from the start of the file, as a pyarrow stream."""
        folder = Folder(self.folder)
        return folder.filesystem.open_input_stream(folder.file(self.name))


@dataclass(frozen=True)
class Chunk:
    """A part of a file that one task reads.

    `start` and `stop` are byte positions for lines of JSON or text (the chunk contains the lines
    that begin in [start, stop)), row groups for Parquet and record batches for Arrow; any other
    file is one chunk, from 0 to 1.
    """

    file: SourceFile
    kind: FileKind
    start: int
    stop: int
    rows: Rows | None = None
    """The rows of the chunk that are used, counted from its first; None: all."""


def find_files(path: str) -> list[SourceFile]:
    """The data files that a path names: a file, or those of a folder or glob, sorted.

    Raises:
        InputError: the path does not exist, the folder has no data file, a file is empty or of an
            unknown kind, or the store cannot be reached.
    """
    stripped = path.rstrip("/")
    parent, _, name = stripped.rpartition("/")
    try:
        files = _find(stripped, parent or "/", name)
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it: {reason(error)}; check its address and permissions"
        ) from None
    check_not_empty(files)
    return files


def check_not_empty(files: Iterable[SourceFile]) -> None:
    """Check that each file has something in it.

    Raises:
        InputError: one is empty, or a link to nothing.
    """
    for file in files:
        if file.size > 0:
            continue
        if file.is_local and _is_broken_link(Path(Folder(file.folder).path, file.name)):
            raise InputError(
                f"{file.place}: a link to a file that does not exist; restore that file, or "
                "remove the link"
            )
        raise InputError(f"{file.place}: the file is empty; expected at least one row of data")


def base_of(path: str) -> tuple[str, str]:
    """The folder of a local path's files, and what of the path stands for them below it.

    Args:
        path: a file, a glob or a folder, whose second part is empty.
    """
    stripped = path.rstrip("/")
    parent, _, name = stripped.rpartition("/")
    if Path(stripped).is_file():
        return parent or "/", f"/{name}"
    if Path(stripped).is_dir():
        return stripped, ""
    base, pattern = _split_pattern(stripped)
    return base, "/" + "/".join(pattern)


def is_data_folder(path: str) -> bool:
    """True if a path names an existing folder.

    Raises:
        InputError: the store cannot be reached.
    """
    folder = Folder(path.rstrip("/"))
    try:
        info = folder.filesystem.get_file_info(folder.path or "/")
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it: {reason(error)}; check its address and permissions"
        ) from None
    return bool(info.type == pafs.FileType.Directory)


def plan_chunks(file: SourceFile, size: int = CHUNK_BYTES) -> list[Chunk]:
    """Split a file into chunks; together, in order, they contain each row once.

    Args:
        file: the file.
        size: bytes of a chunk, where the file can be cut so finely.
    """
    kind = file_kind(file)
    if kind == "parquet":
        return _selected(file, kind, _row_groups(file), size)
    if kind == "arrow":
        return _selected(file, kind, _batches(file), size)
    if file.rows is not None:
        return [Chunk(file, kind, 0, file.size, file.rows)]
    if kind in ("lines", "text") and not file.is_compressed:
        starts = range(0, file.size, size)
        return [Chunk(file, kind, start, min(start + size, file.size)) for start in starts]
    return [Chunk(file, kind, 0, 1)]


def file_kind(file: SourceFile) -> FileKind:
    """The kind of a file by its name; a .json file is an array if it begins with '[', or is one
    object with an array `data`; else lines.

    Raises:
        InputError: a .json file cannot be read.
    """
    extension = _extension(file.name)
    if extension != ".json":
        return _KINDS[extension]
    try:
        with file.open_text() as stream:
            return _kind_of_json(stream)
    except OSError as error:
        raise InputError(
            f"{file.place}: the file is damaged or cannot be read: {reason(error)}; write it again"
        ) from None


def _kind_of_json(stream: Any) -> FileKind:
    text = b""
    while not text and (block := stream.read(_BLOCK)):
        text = block.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"[":
        return "array"
    line, newline, rest = text.partition(b"\n")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        # Not a row of its own: an object over several lines, or a line longer than the block.
        return "array" if _DATA.search(text) and text[:1] == b"{" else "lines"
    is_alone = not newline or not (rest + stream.read(_BLOCK)).strip()
    holds_rows = isinstance(row, dict) and isinstance(row.get("data"), list)
    is_array = is_alone and holds_rows and all(isinstance(item, dict) for item in row["data"])
    return "array" if is_array else "lines"


def _find(path: str, parent: str, name: str) -> list[SourceFile]:
    root = Folder(parent)
    info = root.filesystem.get_file_info(root.file(name))
    if info.type == pafs.FileType.File:
        if _extension(name) not in _KINDS:
            raise InputError(f"{path}: unknown kind of file; {_EXPECTED}")
        return [SourceFile(parent, name, info.size or 0, info.mtime_ns or 0)]
    if info.type == pafs.FileType.Directory:
        files = data_files(path)
        if not files:
            raise InputError(f"{path}: the folder contains no data files; {_EXPECTED}")
        return files
    if not _is_pattern(path):
        raise InputError(f"{path}: no such file or folder; {_EXPECTED}")
    base, pattern = _split_pattern(path)
    below = data_files(base, recursive=len(pattern) > 1)
    files = [file for file in below if _matches(file.name.split("/"), pattern)]
    if not files:
        raise InputError(f"{path}: the pattern matches no data file; {_EXPECTED}")
    return files


def data_files(folder: str, recursive: bool = True) -> list[SourceFile]:
    """Data files below a folder, sorted; hidden ones (.cache, _SUCCESS) are left out, and plain
    text (licences, notes) beside rows."""
    root = Folder(folder)
    selector = pafs.FileSelector(root.path or "/", allow_not_found=True, recursive=recursive)
    files = []
    for info in root.filesystem.get_file_info(selector):
        name = info.path.removeprefix(root.path).lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        is_description = info.base_name in _DESCRIPTIONS
        if info.type != pafs.FileType.File or hidden or is_description:
            continue
        if _extension(name) in _KINDS:
            files.append(SourceFile(folder, name, info.size or 0, info.mtime_ns or 0))
    files += [SourceFile(folder, name, 0, 0) for name in _broken_links(root, recursive)]
    rows = [file for file in files if _extension(file.name) != ".txt"]
    return sorted(rows or files, key=lambda file: file.name)


def _broken_links(root: Folder, recursive: bool) -> Iterator[str]:
    """Names of local links to nothing, which pyarrow leaves out: rows are missing there."""
    for folder, folders, names in os.walk(root.local or ""):
        folders[:] = [name for name in folders if recursive and not name.startswith((".", "_"))]
        for name in names:
            path = Path(folder, name)
            is_data = _extension(name) in _KINDS and not name.startswith((".", "_"))
            if is_data and _is_broken_link(path):
                yield str(path.relative_to(root.path))


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _extension(name: str) -> str:
    """The extension in lower case, ignoring .gz and .zst; empty for compressed Parquet and Arrow
    files, which have their own compression."""
    lower = name.lower()
    for compression in _COMPRESSIONS:
        lower = lower.removesuffix(compression)
    is_compressed = len(lower) < len(name)
    extension = lower[lower.rfind(".") :] if "." in lower else ""
    return "" if is_compressed and extension in _BINARY else extension


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _split_pattern(path: str) -> tuple[str, list[str]]:
    """The folder before the first part with a wildcard, and the parts from there on. A folder that
    exists is none, whatever its name."""
    parts = path.split("/")
    wild = (
        index
        for index, part in enumerate(parts)
        if _is_pattern(part) and not Path("/".join(parts[: index + 1])).is_dir()
    )
    first = next(wild, len(parts) - 1)  # only folders that exist have brackets
    return "/".join(parts[:first]) or "/", parts[first:]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


_Part = tuple[int, int]
"""Number of rows and size in bytes of a row group or record batch."""


def _row_groups(file: SourceFile) -> Iterator[_Part]:
    metadata = parquet_metadata(file)
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return ((group.num_rows, group.total_byte_size) for group in groups)


def _batches(file: SourceFile) -> Iterator[_Part]:
    return ((batch.num_rows, batch.nbytes) for batch in arrow_batches(file))


def _selected(file: SourceFile, kind: FileKind, parts: Iterator[_Part], size: int) -> list[Chunk]:
    """Chunks of consecutive parts that hold used rows, each of at least `size` bytes."""
    first, last = file.rows or (0, MOST_ROWS)
    chunks = []
    start = stop = held = rows = before = 0
    for stop, (count, bytes_) in enumerate(parts, start=1):
        held, rows = held + bytes_, rows + count
        if held >= size:
            chunks.append((start, stop, before, rows))
            start, held, before, rows = stop, 0, before + rows, 0
    if start < stop:
        chunks.append((start, stop, before, rows))
    return [
        Chunk(file, kind, start, stop, _within(file.rows, before, rows))
        for start, stop, before, rows in chunks
        if before < last and before + rows > first
    ]


def _within(rows: Rows | None, before: int, count: int) -> Rows | None:
    if rows is None:
        return None
    return max(0, rows[0] - before), min(count, rows[1] - before)


def arrow_batches(file: SourceFile) -> Iterator[Any]:
    """The record batches of an Arrow file, in its file or stream format; local ones are mapped
    into memory, without a copy.

    Raises:
        InputError: while iterating: the file is not an Arrow file.
    """
    try:
        with (
            pa.memory_map(Folder(file.folder).file(file.name))
            if file.is_local
            else file.open() as source
        ):
            magic = source.read(len(_ARROW_FILE))
            source.seek(0)
            if magic == _ARROW_FILE:
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(source)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file.place}: not an Arrow file, or damaged: {reason(error)}; write it again"
        ) from None


def parquet_metadata(file: SourceFile) -> Any:
    """The footer of a Parquet file.

    Raises:
        InputError: the file is not a Parquet file.
    """
    try:
        with file.open() as stream:
            return pq.ParquetFile(stream).metadata
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{file.place}: not a Parquet file, or damaged: {reason(error)}; write it again"
        ) from None
