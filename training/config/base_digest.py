"""Whether two names mean the same base model.

An adapter says of its base only a name, which for a folder is a path. finray's adapters also hold
`base.json`: the base's name and a digest of its content, which outlives a move of either folder.
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

    Of every file its size, its header, and eight samples of 1 MiB, evenly spaced, count: two
    models of one shape differ in them, and a model of any size takes milliseconds a file.
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
    """Note beside an adapter which base it belongs to."""
    folder = model_folder(model, only_cached=True)
    note = {"base": model.base, "digest": None if folder is None else base_digest(folder)}
    (target / BASE_FILE).write_text(json.dumps(note), encoding="utf-8")


def is_same_base(model: ModelSettings, named: str, noted: str | None) -> bool:
    """Whether an adapter's base is the recipe's.

    Args:
        model: the recipe's model.
        named: the adapter's `base_model_name_or_path`.
        noted: the digest of its base, where finray noted one.
    """
    if named == model.base:
        return noted is None or noted == (_digest(model) or noted)
    ours = _digest(model)
    if ours is None:
        return False
    if noted is not None:
        return ours == noted
    folder = Path(named)
    return folder.is_dir() and ours == base_digest(folder)


def _digest(model: ModelSettings) -> str | None:
    folder = model_folder(model, only_cached=True)
    return None if folder is None else base_digest(folder)
