"""Checks that an adapter and a recipe use the same base model.

An adapter records only the name of its base, which for a folder is a path. finray also writes
`base.json` beside it: the name and a digest of the weights, which stays valid when a folder moves.
"""

import hashlib
import json
from pathlib import Path

from .model_folder import model_folder
from .models import ModelSettings

BASE_FILE = "base.json"
_SAMPLE = 2**20
_SAMPLES = 8


def base_digest(folder: Path) -> str | None:
    """16 hex digits over a model's weights; None where the folder has no safetensors.

    The digest covers the size of each file, its header and eight evenly spaced samples of 1 MiB.
    Models of the same shape differ in these, and a file of any size takes only milliseconds.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(header_size))
            for number in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def write_base(model: ModelSettings, target: Path) -> None:
    """Write base.json with the name and the digest of the base model beside an adapter."""
    folder = model_folder(model, only_cached=True)
    note = {"base": model.base, "digest": None if folder is None else base_digest(folder)}
    (target / BASE_FILE).write_text(json.dumps(note), encoding="utf-8")


def is_same_base(model: ModelSettings, name: str, digest: str | None) -> bool:
    """True if an adapter's base is the recipe's.

    Args:
        model: the recipe's model.
        name: the adapter's `base_model_name_or_path`.
        digest: the digest of its base from base.json, if there is one.
    """
    own_digest = _digest(model)
    if name == model.base:
        return digest is None or own_digest is None or digest == own_digest
    if own_digest is None:
        return False
    if digest is not None:
        return own_digest == digest
    folder = Path(name)
    return folder.is_dir() and own_digest == base_digest(folder)


def _digest(model: ModelSettings) -> str | None:
    folder = model_folder(model, only_cached=True)
    return None if folder is None else base_digest(folder)
