"""What identifies data and tokenizers: hashes of their content."""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.model_folder import model_folder, tokenizer_files
from ..config.models import ModelSettings
from .sources import HUB, SourceFile, file_kind

_BLOCK = 2**20
_CACHEABLE_SECONDS = 2.0
_READ_WHOLE = 64 * 2**20
"""A file up to this size is read in a moment."""


def describe_files(files: Iterable[SourceFile], at_once: bool = True) -> list[object]:
    """What identifies the content of files.

    A local file is identified by its content, a remote object by its size and modification time, a
    data set of the hub by its commit.

    Args:
        files: the files.
        at_once: False to read no large file whole: its size, its modification time, its beginning
            and its end identify it.

    Raises:
        InputError: a file cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda file: _describe_file(file, at_once), files))


def _describe_file(file: SourceFile, at_once: bool) -> list[object]:
    kind = file_kind(file)
    facts = [kind, file.is_compressed, file.rows]
    if file.is_local:
        path = Path(Folder(file.folder).file(file.name))
        try:
            if not at_once and file.size > _READ_WHOLE:
                return [*facts, file.size, file.modified_ns, _hash_of_ends(path)]
            return [*facts, _cached_hash(path)]
        except OSError as error:
            raise InputError(f"{file.place}: cannot read it: {error.strerror}") from None
    if file.uri.startswith(HUB):  # the hub gives no time; the address of a data set has its commit
        return [*facts, file.size, file.uri]
    return [*facts, file.size, file.modified_ns]


def describe_tokenizer(model: ModelSettings) -> dict[str, str]:
    """What identifies a model's tokenizer."""
    folder = model_folder(model)
    assert folder is not None
    return {file.name: _cached_hash(file) for file in tokenizer_files(folder)}


def _cached_hash(path: Path) -> str:
    """The hash of a file; cached in this process until the file changes."""
    status = path.stat()
    if time.time() - status.st_ctime < _CACHEABLE_SECONDS:
        return _hash(path)  # its next change may get the same timestamp
    return _hash_of_version(path, status.st_size, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _hash_of_version(path: Path, size: int, changed_ns: int) -> str:
    del size, changed_ns
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _hash_of_ends(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(_BLOCK))
        stream.seek(-_BLOCK, os.SEEK_END)
        digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
