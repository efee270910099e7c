"""Checkpoints: write, verify and delete them.

A checkpoint is a folder `checkpoints/step-00000100` that transformers can resume from, plus one
`rank-<r>.json` per rank with the SHA-256 of every file that this rank wrote. A rank publishes
its manifest after its files. So a checkpoint that lacks a manifest is unfinished, and one whose
hashes differ is damaged.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import formatting
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


def step_of(name: str) -> int:
    """The step of a checkpoint, by its folder's name."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match.group(1))


def choose(checkpoints: Folder, unusable: Mapping[str, str] | None = None) -> Choice:
    """Choose the newest checkpoint whose hashes all match.

    Args:
        checkpoints: the folder of the checkpoints.
        unusable: names of checkpoints to pass over, and why.

    Raises:
        InputError: a newer finray wrote one of them.
        RunError: finished checkpoints exist, and all of them are damaged.
    """
    skipped = [f"{name}: {reason}" for name, reason in sorted((unusable or {}).items())[::-1]]
    damaged = len(skipped)
    for name in reversed([name for name in _names(checkpoints) if name not in (unusable or ())]):
        folder = checkpoints / name
        manifests = _manifests(folder)
        if manifests is None:
            skipped.append(f"{name}: unfinished, its save was interrupted")
            continue
        for rank, manifest in enumerate(manifests):
            check_format(manifest, FORMAT, folder / _manifest_name(rank))
        fault = _fault(folder, manifests)
        if fault is None:
            return Choice(name, step_of(name), tuple(skipped))
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
        if step_of(name) > step:
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
    """The value of the watched metric in a manifest; None if there is none, or it is not finite."""
    value = manifest.get("metrics", {}).get(watched.name)
    return float(value) if formatting.is_number(value) else None


def _names(checkpoints: Folder) -> list[str]:
    return [name for name in checkpoints.names() if _NAME.fullmatch(name)]


def _manifest_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _manifests(folder: Folder) -> list[dict[str, Any]] | None:
    """The manifests of all ranks; None for an unfinished save. An unreadable manifest is empty."""
    if folder.filesystem.get_file_info(folder.path).is_file:
        return None
    present = {name for name in folder.names() if re.fullmatch(r"rank-\d+\.json", name)}
    if _manifest_name(0) not in present:
        return None
    first = _read_manifest(folder, 0)
    world_size = first.get("world_size", 1)
    if world_size > len(present):
        return None
    if not present.issuperset(_manifest_name(rank) for rank in range(world_size)):
        return None
    return [first, *(_read_manifest(folder, rank) for rank in range(1, world_size))]


def _read_manifest(folder: Folder, rank: int) -> dict[str, Any]:
    """A rank's manifest; empty if it cannot be read, or holds other types than it should."""
    try:
        manifest = json.loads(_content(folder, _manifest_name(rank)) or b"")
    except (ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) and _has_types(manifest) else {}


def _has_types(manifest: dict[str, Any]) -> bool:
    files, metrics = manifest.get("files"), manifest.get("metrics", {})
    numbers = (manifest.get("format", 1), manifest.get("world_size", 1))
    return (
        all(type(number) is int and number > 0 for number in numbers)
        and isinstance(files, dict)
        and all(isinstance(digest, str) and _is_inside(name) for name, digest in files.items())
        and isinstance(metrics, dict)
        and all(value is None or type(value) in (int, float) for value in metrics.values())
    )


def _is_inside(name: str) -> bool:
    """True for a relative path that stays in its folder."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _content(folder: Folder, name: str) -> bytes | None:
    """The bytes of a file; None if there is no such file, but for example a folder."""
    is_file = folder.filesystem.get_file_info(folder.file(name)).is_file
    return folder.read(name) if is_file else None


def _fault(folder: Folder, manifests: Iterable[dict[str, Any]]) -> str | None:
    for rank, manifest in enumerate(manifests):
        if not manifest:
            return f"{_manifest_name(rank)} cannot be read"
        for name, digest in manifest["files"].items():
            content = _content(folder, name)
            if content is None:
                return f"{name} is missing"
            if _sha256(content) != digest:
                return f"{name} ({len(content)} bytes) differs from what was saved"
    return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
