"""Digests of the files that a model consists of, and the check that an adapter fits its base.

A file up to 64 MiB is hashed whole. Of a larger file of weights the digest covers the size, the
header, and of every tensor its first, middle and last 4 KiB: each change that touches all of a
tensor is noticed (training, scaling, another type), within milliseconds and whatever the size; a
single changed value in between is not.

An adapter records only the name of its base, which for a folder is a path. finray also writes
`base.json` beside it: the name and a digest of the weights, which stays valid when a folder moves.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..common.errors import InputError, reason
from ..common.storage import Folder
from .model_folder import model_folder
from .models import ModelSettings
from .weight_files import StoredTensor, read_header

BASE_FILE = "base.json"
ADDED = "add_tokens"
"""Key of the added tokens in it."""
_WHOLE = 64 * 2**20
_BLOCK = 4096
_CHUNK = 2**20
_THREADS = 16
_CACHEABLE_SECONDS = 2.0


def file_digests(folder: Folder, names: Iterable[str]) -> dict[str, str]:
    """16 hex digits for each of these files of a folder, by name.

    Raises:
        InputError: a file cannot be read, or a large one is not in the safetensors format.
    """
    chosen = sorted(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(chosen, pool.map(lambda name: _digest(folder, name), chosen), strict=True))


def base_digest(folder: Path) -> str | None:
    """16 hex digits over a model's weights; None where the folder has no safetensors.

    Raises:
        InputError: as `file_digests`.
    """
    names = [file.name for file in folder.glob("*.safetensors")]
    if not names:
        return None
    digests = file_digests(Folder(str(folder.absolute())), names)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _digest(folder: Folder, name: str) -> str:
    """The digest of a file, kept in this process until the file changes."""
    try:
        version, is_settled = _version(folder, name)
        if not is_settled:  # its next change may get the same timestamp
            return _compute(folder, name)
        return _digest_of_version(folder, name, version)
    except OSError as error:
        raise InputError(
            f"{folder / name}: cannot be read: {reason(error)}; restore the file, or make it "
            "readable"
        ) from None


def _version(folder: Folder, name: str) -> tuple[tuple[int, ...], bool]:
    """What changes with a file, and whether the next change will show in it."""
    if folder.local is None:
        info = folder.filesystem.get_file_info(folder.file(name))
        return (info.size or 0, info.mtime_ns or 0), False
    status = (folder.local / name).stat()
    version = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return version, time.time() - status.st_ctime > _CACHEABLE_SECONDS


@lru_cache(maxsize=4096)
def _digest_of_version(folder: Folder, name: str, version: tuple[int, ...]) -> str:
    del version
    return _compute(folder, name)


def _compute(folder: Folder, name: str) -> str:
    digest = hashlib.sha256()
    with folder.filesystem.open_input_file(folder.file(name)) as stream:
        size = int(stream.size())
        if size <= _WHOLE or not name.endswith(".safetensors"):
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        else:
            tensors = read_header(folder, name)
            digest.update(f"{size}".encode())
            for start, length in _samples(tensors.values()):
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()[:16]


def _samples(tensors: Iterable[StoredTensor]) -> Iterator[tuple[int, int]]:
    """(place, bytes) of the header and of each tensor's first, middle and last block."""
    ordered = sorted(tensors, key=lambda tensor: tensor.start)
    yield 0, ordered[0].start if ordered else 0
    for tensor in ordered:
        size = tensor.stop - tensor.start
        block = min(_BLOCK, size)
        for place in dict.fromkeys((0, (size - block) // 2, size - block)):
            yield tensor.start + place, block


def write_base(model: ModelSettings, target: Path, tokens: Sequence[str] = ()) -> None:
    """Write base.json beside an adapter: name and digest of its base, and the added tokens."""
    folder = model_folder(model, only_cached=True)
    note: dict[str, Any] = {"base": model.base}
    note["digest"] = None if folder is None else base_digest(folder)
    if tokens:
        note[ADDED] = list(tokens)
    (target / BASE_FILE).write_text(json.dumps(note), encoding="utf-8")


def is_same_base(model: ModelSettings, name: str, digest: Any) -> bool:
    """True if an adapter's base is the recipe's.

    Args:
        model: the recipe's model.
        name: the adapter's `base_model_name_or_path`.
        digest: the digest of its base from base.json, if there is one.
    """
    own_digest = _digest_of(model)
    if name == model.base:
        return digest is None or own_digest is None or digest == own_digest
    if own_digest is None:
        return False
    if digest is not None:
        return bool(own_digest == digest)
    folder = Path(name)
    return folder.is_dir() and own_digest == base_digest(folder)


def _digest_of(model: ModelSettings) -> str | None:
    folder = model_folder(model, only_cached=True)
    return None if folder is None else base_digest(folder)
