"""The name of a prepared data set: a hash of everything that determines its content."""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from ..config.model_folder import model_folder, tokenizer_files
from ..config.models import ModelSettings
from ..config.recipe import Recipe
from .rendering import RenderSettings
from .resolve import ResolvedData, ResolvedSource, resolve_data
from .sources import SourceFile, file_kind

FORMAT_VERSION = 2
"""Increased when a new version prepares the same inputs differently."""

_BLOCK = 2**20
_CACHEABLE_SECONDS = 2.0


def fingerprint(recipe: Recipe, data: ResolvedData | None = None) -> str:
    """Hash the content of the sources and the tokenizer, and the settings that determine how
    rows become sequences; returns 16 hex digits.

    A local file is identified by its content, a remote object by its size and modification time.
    Paths and training settings do not count.

    Args:
        recipe: the recipe.
        data: its sources, if they are resolved already.

    Raises:
        InputError: a source or the model does not exist.
    """
    data = data or resolve_data(recipe)
    render = asdict(RenderSettings.of(recipe))
    del render["base"], render["revision"], render["trust_remote_code"]
    facts = {
        "version": FORMAT_VERSION,
        "train": _describe(data.train),
        "eval": _describe(data.eval),
        "render": render,
        "method": recipe.method.kind,
        "packing": recipe.packs,
        "holdout": recipe.data.holdout,
        "tokenizer": _describe_tokenizer(recipe.model),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _describe(sources: Sequence[ResolvedSource]) -> list[object]:
    with ThreadPoolExecutor() as pool:
        return [
            [source.format, source.weight, list(pool.map(_describe_file, source.files))]
            for source in sources
        ]


def _describe_file(file: SourceFile) -> list[object]:
    kind = file_kind(file)
    if file.is_local:
        return [kind, file.is_compressed, _cached_hash(Path(file.uri))]
    return [kind, file.is_compressed, file.size, file.modified_ns]


def _describe_tokenizer(model: ModelSettings) -> dict[str, str]:
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
