"""Finds the data files of a source, and splits them into chunks that tasks read in parallel."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.sections import Source

CHUNK_BYTES = 4 * 2**20
"""Bytes of JSON Lines (or of decompressed Parquet row groups) that one task reads."""

FileKind = Literal["lines", "array", "parquet", "csv", "tsv"]

_KINDS: dict[str, FileKind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
_COMPRESSIONS = (".gz", ".zst")
_EXPECTED = (
    "give a file, folder or glob of .jsonl, .ndjson, .json, .parquet, .csv or .tsv files "
    "(text also as .gz or .zst)"
)


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

    @property
    def uri(self) -> str:
        """URI or absolute path of the file."""
        return f"{self.folder.rstrip('/')}/{self.name}"

    @property
    def is_local(self) -> bool:
        return Folder(self.folder).local is not None

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

    `start` and `stop` are byte positions for JSON Lines (the chunk contains the lines that begin
    in [start, stop)) and row groups for Parquet; any other file is one chunk, from 0 to 1.
    """

    file: SourceFile
    kind: FileKind
    start: int
    stop: int


def expand(source: Source) -> list[SourceFile]:
    """All data files of a source, sorted by path.

    Raises:
        InputError: the path does not exist, the folder has no data file, a file is empty or of an
            unknown kind, or the store cannot be reached.
    """
    path = source.path.rstrip("/")
    parent, _, name = path.rpartition("/")
    try:
        files = _find(path, parent or "/", name)
    except OSError as error:
        raise InputError(f"{source.path}: cannot read it: {error}") from None
    for file in files:
        if file.size == 0:
            raise InputError(f"{file.uri}: the file is empty; expected at least one row of data")
    return files


def plan_chunks(file: SourceFile) -> list[Chunk]:
    """Split a file into chunks; together, in order, they contain each row once."""
    kind = file_kind(file)
    if kind == "parquet":
        return _row_group_chunks(file)
    if kind == "lines" and not file.is_compressed:
        starts = range(0, file.size, CHUNK_BYTES)
        return [Chunk(file, kind, start, min(start + CHUNK_BYTES, file.size)) for start in starts]
    return [Chunk(file, kind, 0, 1)]


def file_kind(file: SourceFile) -> FileKind:
    """The kind of a file by its name; a .json file that begins with '[' is an array, else lines."""
    extension = _extension(file.name)
    if extension != ".json":
        return _KINDS[extension]
    with file.open_text() as stream:
        while block := stream.read(4096):
            text = block.lstrip(b"\xef\xbb\xbf \t\r\n")
            if text:
                return "array" if text[:1] == b"[" else "lines"
    return "lines"


def _find(path: str, parent: str, name: str) -> list[SourceFile]:
    root = Folder(parent)
    info = root.filesystem.get_file_info(root.file(name))
    if info.type == pafs.FileType.File:
        if _extension(name) not in _KINDS:
            raise InputError(f"{path}: unknown kind of file; {_EXPECTED}")
        return [SourceFile(parent, name, info.size or 0, info.mtime_ns or 0)]
    if info.type == pafs.FileType.Directory:
        files = _data_files(path, recursive=True)
        if not files:
            raise InputError(f"{path}: the folder contains no data files; {_EXPECTED}")
        return files
    if not _is_pattern(path):
        raise InputError(f"{path}: no such file or folder; {_EXPECTED}")
    base, pattern = _split_pattern(path)
    below = _data_files(base, recursive=len(pattern) > 1)
    files = [file for file in below if _matches(file.name.split("/"), pattern)]
    if not files:
        raise InputError(f"{path}: the pattern matches no data file; {_EXPECTED}")
    return files


def _data_files(folder: str, recursive: bool) -> list[SourceFile]:
    """Data files below a folder, sorted; hidden ones (.cache, _SUCCESS) are left out."""
    root = Folder(folder)
    selector = pafs.FileSelector(root.path or "/", allow_not_found=True, recursive=recursive)
    files = []
    for info in root.filesystem.get_file_info(selector):
        name = info.path.removeprefix(root.path).lstrip("/")
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == pafs.FileType.File and not hidden and _extension(name) in _KINDS:
            files.append(SourceFile(folder, name, info.size or 0, info.mtime_ns or 0))
    return sorted(files, key=lambda file: file.name)


def _extension(name: str) -> str:
    """The extension in lower case, ignoring .gz and .zst; empty for compressed Parquet files,
    because Parquet has its own compression."""
    lower = name.lower()
    for compression in _COMPRESSIONS:
        lower = lower.removesuffix(compression)
    is_compressed = len(lower) < len(name)
    extension = lower[lower.rfind(".") :] if "." in lower else ""
    return "" if is_compressed and extension == ".parquet" else extension


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _split_pattern(path: str) -> tuple[str, list[str]]:
    """The folder before the first part with a wildcard, and the parts from there on."""
    parts = path.split("/")
    first = next(index for index, part in enumerate(parts) if _is_pattern(part))
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


def _row_group_chunks(file: SourceFile) -> list[Chunk]:
    return [Chunk(file, "parquet", start, stop) for start, stop in _row_group_ranges(file)]


def _row_group_ranges(file: SourceFile) -> Iterator[tuple[int, int]]:
    metadata = parquet_metadata(file)
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= CHUNK_BYTES or group + 1 == metadata.num_row_groups:
            yield start, group + 1
            start, size = group + 1, 0


def parquet_metadata(file: SourceFile) -> Any:
    """The footer of a Parquet file.

    Raises:
        InputError: the file is not a Parquet file.
    """
    try:
        with file.open() as stream:
            return pq.ParquetFile(stream).metadata
    except pa.ArrowInvalid as error:
        raise InputError(f"{file.uri}: not a Parquet file, or damaged: {error}") from None
