"""Checkpoints that can be trusted: written, verified, rotated.

A checkpoint is a folder `checkpoints/step-00000100` that transformers can resume from, plus one
`rank-<r>.json` per rank with the SHA-256 of every file which that rank wrote. A rank's manifest
is published after its files: a checkpoint without all its manifests was never finished, one
whose hashes differ is damaged.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import RunError
from ..common.storage import Folder
from ..common.versions import check_format
from ..config.metric import Metric

FORMAT = 1
"""Of a rank's manifest; raised when an older finray could not read the checkpoint."""
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Choice:
    """Where to resume from: a good checkpoint or none, and the newer ones that cannot be used."""

    name: str | None
    step: int
    skipped: tuple[str, ...]
    """One line each: checkpoint and what is wrong with it."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def make_manifest(staged: Path, rank: int, world_size: int, metrics: dict[str, float]) -> bytes:
    """A rank's manifest over all files that it has staged."""
    files = {
        path.relative_to(staged).as_posix(): _sha256_of_file(path)
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, "world_size": world_size, "metrics": metrics, "files": files}
    return json.dumps(manifest).encode()


def publish(staged: Path, target: Folder, rank: int, manifest: bytes) -> None:
    """Copy a rank's staged files into the checkpoint, its manifest last."""
    target.upload(staged)
    target.write(_manifest_name(rank), manifest)


def remove_partial(staged: Path, target: Folder, rank: int) -> None:
    """Delete a rank's files of a checkpoint that it cannot complete, as a disk may be full."""
    target.delete(_manifest_name(rank))
    for path in staged.rglob("*"):
        if path.is_file():
            target.delete(path.relative_to(staged).as_posix())


def choose(checkpoints: Folder) -> Choice:
    """The newest checkpoint whose every hash holds.

    Raises:
        InputError: a newer finray wrote one of them.
        RunError: finished checkpoints exist, and all of them are damaged.
    """
    skipped: list[str] = []
    damaged = 0
    for name in reversed(_names(checkpoints)):
        folder = checkpoints / name
        manifests = _manifests(folder)
        if manifests is None:
            skipped.append(f"{name}: unfinished, the save was cut off")
            continue
        for rank, manifest in enumerate(manifests):
            check_format(manifest, FORMAT, folder / _manifest_name(rank))
        fault = _fault(folder, manifests)
        if fault is None:
            return Choice(name, _step(name), tuple(skipped))
        damaged += 1
        skipped.append(f"{name}: damaged, {fault}")
    if damaged:
        raise RunError(
            f"all checkpoints in {checkpoints} are damaged:\n  "
            + "\n  ".join(skipped)
            + "\nRestore one of them from a backup, or delete the run's folder to start anew."
        )
    return Choice(None, 0, tuple(skipped))


def newest(checkpoints: Folder) -> str | None:
    """Name of the newest finished checkpoint; its hashes are not looked at."""
    names = reversed(_names(checkpoints))
    return next((name for name in names if _manifests(checkpoints / name) is not None), None)


def delete_after(checkpoints: Folder, step: int) -> None:
    """Delete later checkpoints: a new save of such a step must not be taken for complete by the
    manifests of an old one."""
    for name in _names(checkpoints):
        if _step(name) > step:
            checkpoints.delete(name)


def rotate(checkpoints: Folder, keep: int, watched: Metric) -> list[str]:
    """Delete all but the last `keep` finished checkpoints and the best one.

    An unfinished checkpoint older than a finished one is a leftover, and deleted too.

    Returns:
        Names of what was deleted.
    """
    finished: dict[str, float | None] = {}
    for name in _names(checkpoints):
        manifests = _manifests(checkpoints / name)
        if manifests is not None:
            finished[name] = _value(manifests[0], watched)
    if not finished:
        return []
    kept = set(list(finished)[-keep:])
    best_name = _best(finished, watched)
    if best_name is not None:
        kept.add(best_name)
    newest = max(finished)
    old = [name for name in _names(checkpoints) if name not in kept and name < newest]
    for name in old:
        checkpoints.delete(name)
    return old


def best(checkpoints: Folder, watched: Metric) -> str | None:
    """Name of the finished checkpoint that was best on held-out data."""
    values: dict[str, float | None] = {}
    for name in _names(checkpoints):
        manifests = _manifests(checkpoints / name)
        values[name] = _value(manifests[0], watched) if manifests else None
    return _best(values, watched)


def _best(values: dict[str, float | None], watched: Metric) -> str | None:
    """The first of the best names; names without a value are out."""
    name_of_best: str | None = None
    top = 0.0
    for name, value in values.items():
        if value is not None and (name_of_best is None or watched.better(value, top)):
            name_of_best, top = name, value
    return name_of_best


def _value(manifest: dict[str, Any], watched: Metric) -> float | None:
    """The figure noted with a checkpoint; a manifest that cannot be read has none."""
    value = manifest.get("metrics", {}).get(watched.name)
    return None if value is None else float(value)


def _names(checkpoints: Folder) -> list[str]:
    return [name for name in checkpoints.names() if _NAME.fullmatch(name)]


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match.group(1))


def _manifest_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _manifests(folder: Folder) -> list[dict[str, Any]] | None:
    """All ranks' manifests, an empty one for what cannot be parsed; None for an unfinished save."""
    present = {name for name in folder.names() if re.fullmatch(r"rank-\d+\.json", name)}
    if _manifest_name(0) not in present:
        return None
    first = _parse(folder.read(_manifest_name(0)))
    world_size = int(first.get("world_size", 1))
    expected = [_manifest_name(rank) for rank in range(world_size)]
    if not present.issuperset(expected):
        return None
    return [first, *(_parse(folder.read(name)) for name in expected[1:])]


def _parse(content: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
    except ValueError:
        return {}
    return manifest if isinstance(manifest, dict) and "files" in manifest else {}


def _fault(folder: Folder, manifests: Iterable[dict[str, Any]]) -> str | None:
    for rank, manifest in enumerate(manifests):
        if not manifest:
            return f"{_manifest_name(rank)} cannot be read"
        for name, digest in manifest["files"].items():
            try:
                content = folder.read(name)
            except FileNotFoundError:
                return f"{name} is missing"
            if _sha256(content) != digest:
                return f"{name} ({len(content)} bytes) differs from what was saved"
    return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
