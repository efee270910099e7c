"""The name of a prepared data set: a hash of everything that decides its content."""

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
"""Raised when the same inputs would be prepared differently."""

_BLOCK = 2**20
_SETTLED_SECONDS = 2.0


def fingerprint(recipe: Recipe, data: ResolvedData | None = None) -> str:
    """16 hex digits over the content of the sources and the tokenizer, and the settings that
    decide how rows become sequences.

    A local file counts with its content, a remote object with its size and time of change. Paths
    do not count, nor does anything about training.

    Args:
        recipe: the recipe.
        data: its sources, where they are resolved already.

    Raises:
        InputError: for sources or a model that cannot be found.
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
        return [kind, file.is_compressed, _hash_as_it_is(Path(file.uri))]
    return [kind, file.is_compressed, file.size, file.modified_ns]


def _describe_tokenizer(model: ModelSettings) -> dict[str, str]:
    folder = model_folder(model)
    assert folder is not None
    return {file.name: _hash_as_it_is(file) for file in tokenizer_files(folder)}


def _hash_as_it_is(path: Path) -> str:
    """A file is read once a process, as long as it stays what it is."""
    status = path.stat()
    if time.time() - status.st_ctime < _SETTLED_SECONDS:
        return _hash(path)  # its next change may bear the same time
    return _known_hash(path, status.st_size, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _known_hash(path: Path, size: int, changed_ns: int) -> str:
    del size, changed_ns
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
