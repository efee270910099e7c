"""Folders on a disk or in an object store, behind one small class.

finray writes all its files (prepared data, checkpoints, a run's files) through `Folder`. Each
write is atomic: a reader gets the old file or the new one, never a part.
"""

import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from .errors import InputError
from .formatting import one_line

USED = "used"
"""An empty file whose time is that of its folder, in an object store."""
_BUCKETS = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "viewfs", "hdfs"})
"""Kinds of storage whose URI names a bucket, a container or a host first."""


@lru_cache(maxsize=16)
def _filesystem(root: str) -> tuple[Any, str]:
    """(filesystem, path) of the root of a URI; cached, because a client is slow to create."""
    try:
        if root.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), ""
        filesystem, path = pafs.FileSystem.from_uri(root)
    except (ValueError, OSError) as error:
        raise InputError(
            f"cannot open storage {root}: {one_line(str(error))}; correct the URI"
        ) from None
    return filesystem, str(path)


def _open(uri: str) -> tuple[Any, str]:
    """(filesystem, path) of a URI or of an absolute local path."""
    if "://" not in uri:
        return _filesystem("/")[0], uri
    address, question, query = uri.partition("?")
    scheme, _, rest = address.partition("://")
    host, _, below = ("", "", rest) if scheme == "hf" else rest.partition("/")
    if scheme in _BUCKETS and not host:
        raise InputError(f"cannot open storage {uri}: it names no bucket; give {scheme}://BUCKET/…")
    filesystem, root = _filesystem(
        f"{scheme}://{host}{'/' if scheme == 'file' else ''}{question}{query}"
    )
    return filesystem, f"{root.rstrip('/')}/{below}".rstrip("/") if root else below


def _copy_to_disk(source: Path, target: Path) -> None:
    """Copy a file, and wait until it is on the disk (fsync)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


@dataclass(frozen=True)
class Folder:
    """A folder named by an absolute local path or a URI that pyarrow.fs opens."""

    uri: str

    @property
    def filesystem(self) -> Any:
        """The pyarrow filesystem that holds the folder."""
        return _open(self.uri)[0]

    @property
    def path(self) -> str:
        """The folder's path inside its filesystem."""
        return str(_open(self.uri)[1]).rstrip("/")

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "Folder":
        """The folder that holds this one, in the same store; a root or a bucket is its own."""
        address, question, query = self._parts
        scheme, separator, path = address.rstrip("/").rpartition("://")
        if "/" not in path:
            return self
        above = path.rpartition("/")[0] or "/"
        return Folder(f"{scheme}{separator}{above}{question}{query}")

    @property
    def _parts(self) -> tuple[str, str, str]:
        """Address, question mark and query: only a URI has the latter two."""
        return self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")

    @property
    def local(self) -> Path | None:
        """The folder as a path on this machine's disk; None for an object store."""
        is_local = self.filesystem.type_name == "local"
        return Path(self.path) if is_local else None

    def __truediv__(self, name: str) -> "Folder":
        address, question, query = self._parts
        return Folder(f"{address.rstrip('/')}/{name}{question}{query}")

    def __str__(self) -> str:
        return self.uri

    def file(self, name: str) -> str:
        """Path of a file inside the filesystem, for pyarrow's own readers and writers."""
        return f"{self.path}/{name}"

    def create(self) -> "Folder":
        """Create the folder if it does not exist; returns itself."""
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def require_folder(self) -> None:
        """Refuse a path that is not a folder and cannot become one.

        Raises:
            InputError: a file stands there, or the store cannot be reached.
        """
        local = self.local
        try:
            if local is None:
                self.exists()
                return
            nearest = next(path for path in (local, *local.parents) if path.exists())
        except OSError as error:
            raise InputError(
                f"{self.uri}: cannot be reached: {one_line(str(error))}; give another folder"
            ) from None
        if not nearest.is_dir():
            raise InputError(f"{self.uri}: {nearest} is a file; give a folder")

    def require_writable(self) -> None:
        """Refuse a local folder in which this process may not write.

        Raises:
            InputError: naming the folder that lacks the permission, or that is read-only.
        """
        local = self.local
        if local is None:
            return
        nearest = next(path for path in (local, *local.parents) if path.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(
                f"{self.uri}: cannot write in {nearest}; give another folder, or change its "
                "permissions"
            )

    def exists(self, name: str = "") -> bool:
        """True if the folder, or the file or folder `name` inside it, exists."""
        path = self.file(name) if name else self.path
        return bool(self.filesystem.get_file_info(path).type != pafs.FileType.NotFound)

    def modified(self, name: str) -> float | None:
        """When a file was written, in seconds by the storage's clock; None if it does not exist."""
        mtime_ns = self.filesystem.get_file_info(self.file(name)).mtime_ns
        return None if mtime_ns is None else mtime_ns / 1e9

    def names(self) -> list[str]:
        """Sorted names of the files and folders directly inside; empty if the folder is missing."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def files(self) -> list[str]:
        """Relative paths of all files below the folder, sorted."""
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        return sorted(
            os.path.relpath(info.path, self.path)
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        )

    def size(self, name: str = "") -> int:
        """Bytes of a file or folder inside, or of this folder; 0 if it does not exist."""
        path = self.file(name) if name else self.path
        info = self.filesystem.get_file_info(path)
        if info.type != pafs.FileType.Directory:
            return int(info.size or 0)
        selector = pafs.FileSelector(path, allow_not_found=True, recursive=True)
        return sum(int(item.size or 0) for item in self.filesystem.get_file_info(selector))

    def newest(self, name: str = "") -> float | None:
        """When the newest file of a folder inside, or of this folder, was written; see `modified`.

        The time of an empty folder is its own.
        """
        path = self.file(name) if name else self.path
        infos = [self.filesystem.get_file_info(path)]
        if infos[0].type == pafs.FileType.Directory:
            selector = pafs.FileSelector(path, allow_not_found=True, recursive=True)
            infos += self.filesystem.get_file_info(selector)
        times = [info.mtime_ns for info in infos if info.mtime_ns is not None]
        return max(times) / 1e9 if times else None

    def touch(self) -> None:
        """Say that an existing folder is used now, which `newest` then returns.

        Nothing happens to a folder that does not exist, or in which this process may not write.
        """
        if not self.exists():
            return
        with suppress(PermissionError, FileNotFoundError):
            if self.local is not None:
                os.utime(self.local)
            else:
                self.write(USED, b"")

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self.filesystem.open_input_stream(self.file(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically: readers get the old content or the new, also after a crash."""
        if self.local is None:
            with self.filesystem.open_output_stream(self.file(name)) as stream:
                stream.write(content)
            return
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, source: Path) -> None:
        """Copy every file below a local folder into this one."""
        if self.local is not None:
            for path in source.rglob("*"):
                if path.is_file():
                    _copy_to_disk(path, self.local / path.relative_to(source))
            return
        self.create()
        pafs.copy_files(
            str(source),
            self.path,
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=self.filesystem,
        )

    def download(self, target: Path) -> None:
        """Copy every file below this folder into a local one."""
        target.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(
            self.path,
            str(target),
            source_filesystem=self.filesystem,
            destination_filesystem=pafs.LocalFileSystem(),
        )

    def move_to(self, target: "Folder") -> None:
        """Rename this folder; in an object store, copy its files and then delete them here."""
        if self.local is not None and target.local is not None:
            self.local.rename(target.local)
            return
        pafs.copy_files(
            self.path,
            target.path,
            source_filesystem=self.filesystem,
            destination_filesystem=target.filesystem,
        )
        self.delete()

    def delete(self, name: str = "") -> None:
        """Delete a file or folder inside, or this folder; no error if it does not exist."""
        path = self.file(name) if name else self.path
        kind = self.filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(path)
