"""What identifies data and tokenizers: hashes of their content."""

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.model_folder import model_folder, tokenizer_files
from ..config.models import ModelSettings
from .sources import HUB, SourceFile, file_kind

_BLOCK = 2**20
_CACHEABLE_SECONDS = 2.0
_READ_WHOLE = 64 * 2**20
"""A file up to this size is read in a moment."""
_PARTS, _PART = 64, 2**18
"""Parts of a larger one that are read, and their bytes."""
_SAMPLED = "parts:"
"""Begins what identifies a file of which only parts are read."""


def describe_files(files: Iterable[SourceFile], at_once: bool = True) -> list[object]:
    """What identifies the content of files.

    A local file is identified by its content, a remote object by its size and modification time, a
    data set of the hub by its commit.

    Args:
        files: the files.
        at_once: False to read no large file whole: its size, its time and evenly spread parts of it
            identify it.

    Raises:
        InputError: a file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda file: _describe_file(file, at_once), files))


def identified(files: Iterable[SourceFile], at_once: bool = True) -> tuple[SourceFile, ...]:
    """The files with what identifies their content, which tasks on other nodes compare.

    Args:
        files: the files.
        at_once: see `describe_files`.

    Raises:
        InputError: a file cannot be read.
    """

    def with_content(file: SourceFile) -> SourceFile:
        return replace(file, content=_content(file, at_once)) if file.is_local else file

    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(with_content, files))


def is_unchanged(file: SourceFile) -> bool:
    """True if a file is as it was listed: by its time, or else by its content, as a copy on another
    node may have another time; of a file of which only parts are read, the time decides. Of a data
    set of the hub, its address says so."""
    if file.uri.startswith(HUB):
        return True
    folder = Folder(file.folder)
    info = folder.filesystem.get_file_info(folder.file(file.name))
    # Stores tell a time in a list and of one object with different precision.
    unit = 1 if file.is_local else 10**9
    if info.size != file.size or (info.mtime_ns or 0) // unit == file.modified_ns // unit:
        return bool(info.size == file.size)
    content = file.content
    if content is None or content.startswith(_SAMPLED):
        return False
    return content == _content(file, at_once=True)


def _describe_file(file: SourceFile, at_once: bool) -> list[object]:
    kind = file_kind(file)
    facts = [kind, file.is_compressed, file.rows]
    if file.is_local:
        return [*facts, file.content or _content(file, at_once)]
    if file.uri.startswith(HUB):  # the hub gives no time; the address of a data set has its commit
        return [*facts, file.size, file.uri]
    return [*facts, file.size, file.modified_ns]


def _content(file: SourceFile, at_once: bool) -> str:
    """What identifies the bytes of a local file."""
    path = Path(Folder(file.folder).file(file.name))
    try:
        if at_once or file.size <= _READ_WHOLE:
            return _cached_hash(path)
        parts = _cached_hash(path, of_parts=True)
        return f"{_SAMPLED}{file.size}-{file.modified_ns}-{parts}"
    except OSError as error:
        raise InputError(
            f"{file.place}: cannot read it: {error.strerror}; check its permissions"
        ) from None


def describe_tokenizer(model: ModelSettings) -> dict[str, str]:
    """What identifies a model's tokenizer."""
    folder = model_folder(model)
    assert folder is not None
    return {file.name: _cached_hash(file) for file in tokenizer_files(folder)}


def _cached_hash(path: Path, of_parts: bool = False) -> str:
    """The hash of a file, or of parts of it; cached in this process until the file changes."""
    status = path.stat()
    read = _hash_of_parts if of_parts else _hash
    if time.time() - status.st_ctime < _CACHEABLE_SECONDS:
        return read(path)  # its next change may get the same timestamp
    return _hash_of_version(path, of_parts, status.st_size, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _hash_of_version(path: Path, of_parts: bool, size: int, changed_ns: int) -> str:
    del size, changed_ns
    return _hash_of_parts(path) if of_parts else _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _hash_of_parts(path: Path) -> str:
    """The hash of evenly spread parts, the beginning and the end among them."""
    digest = hashlib.sha256()
    last = max(0, path.stat().st_size - _PART)
    with path.open("rb") as stream:
        for place in np.linspace(0, last, _PARTS).astype(np.int64).tolist():
            stream.seek(place)
            digest.update(stream.read(_PART))
    return digest.hexdigest()
