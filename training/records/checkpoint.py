"""Checkpoints: write, verify and delete them.

A checkpoint is a folder `checkpoints/step-00000100` that transformers can resume from, plus one
`rank-<r>.json` per rank with the SHA-256 of every file that this rank wrote. A rank publishes
its manifest after its files. So a checkpoint that lacks a manifest is unfinished, and one whose
hashes differ is damaged.
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
"""Format of a rank's manifest; increased when an older finray cannot read the checkpoint."""
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from, if any, and the newer ones that cannot be used."""

    name: str | None
    step: int
    skipped: tuple[str, ...]
    """A line for each unusable checkpoint: its name and what is wrong with it."""


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def make_manifest(staged: Path, rank: int, world_size: int, metrics: dict[str, float]) -> bytes:
    """The manifest of a rank, with the hashes of all files that it has staged."""
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
    """Delete a rank's files of a checkpoint that it cannot complete; the disk may be full."""
    target.delete(_manifest_name(rank))
    for path in staged.rglob("*"):
        if path.is_file():
            target.delete(path.relative_to(staged).as_posix())


def choose(checkpoints: Folder) -> Choice:
    """Choose the newest checkpoint whose hashes all match.

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
            skipped.append(f"{name}: unfinished, its save was interrupted")
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
            + "\nRestore one of them from a backup, or delete the run's folder to start over."
        )
    return Choice(None, 0, tuple(skipped))


def newest(checkpoints: Folder) -> str | None:
    """Name of the newest finished checkpoint, or None; its hashes are not checked."""
    names = reversed(_names(checkpoints))
    return next((name for name in names if _manifests(checkpoints / name) is not None), None)


def delete_after(checkpoints: Folder, step: int) -> None:
    """Delete checkpoints of later steps. Otherwise their old manifests could make an unfinished new
    save of the same step look complete."""
    for name in _names(checkpoints):
        if _step(name) > step:
            checkpoints.delete(name)


def rotate(checkpoints: Folder, keep: int, watched: Metric) -> list[str]:
    """Delete all but the last `keep` finished checkpoints and the best one.

    An unfinished checkpoint that is older than a finished one is deleted too.

    Returns:
        Names of the deleted checkpoints.
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
    """Name of the finished checkpoint with the best value of the watched metric, or None."""
    values: dict[str, float | None] = {}
    for name in _names(checkpoints):
        manifests = _manifests(checkpoints / name)
        values[name] = _value(manifests[0], watched) if manifests else None
    return _best(values, watched)


def _best(values: dict[str, float | None], watched: Metric) -> str | None:
    """The name with the best value, the first of equals; None if no name has a value."""
    name_of_best: str | None = None
    top = 0.0
    for name, value in values.items():
        if value is not None and (name_of_best is None or watched.better(value, top)):
            name_of_best, top = name, value
    return name_of_best


def _value(manifest: dict[str, Any], watched: Metric) -> float | None:
    """The value of the watched metric in a manifest; None if it has none or cannot be read."""
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
    """The manifests of all ranks; None for an unfinished save. An unreadable manifest is empty."""
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
