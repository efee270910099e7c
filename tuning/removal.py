"""Deletes runs, sweeps and leftovers of a storage: first a plan with sizes, then the deletion.

On a disk a folder is renamed into <storage>/.deleted before its files go, under the lock that a run
takes: whatever happens, a run is there as a whole or not at all. An object store has no renaming;
there run.json goes first, so that no reader takes the rest for a run.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..training.common.errors import InputError, reason
from ..training.common.formatting import is_number
from ..training.common.lock import hold_run_lock
from ..training.common.progress import Progress
from ..training.common.storage import Folder
from ..training.records.run_folder import RUN_FILE
from .storage_contents import Entry, entry_of, referrers
from .sweep_folder import SWEEP_FILE

DELETED_FOLDER = ".deleted"
"""Where folders of a storage lie while they are deleted; no run can have this name."""


@dataclass(frozen=True)
class Doomed:
    """A folder or file that may be deleted."""

    name: str
    """Its path in the storage."""
    kind: str
    """run, sweep, prepared data, …"""
    size: int
    """Bytes."""
    why: str
    entry: Entry | None = None
    """The run or sweep that it is."""
    is_still_unused: Callable[[Folder], bool] = field(default=lambda _: True, compare=False)
    """Asked again once it is out of reach of whoever starts to use it."""


@dataclass(frozen=True)
class Removal:
    """What would be deleted, and what is kept and why."""

    storage: Folder
    doomed: list[Doomed]
    kept: list[tuple[str, str]]
    """(name, reason)"""

    @property
    def size(self) -> int:
        """Bytes that the deletion frees."""
        return sum(item.size for item in self.doomed)

    def as_json(self, deleted: Sequence[str]) -> dict[str, Any]:
        """As plain values; `deleted` holds the names of what was deleted by now."""
        return {
            "storage": self.storage.uri,
            "remove": [
                {"name": item.name, "kind": item.kind, "bytes": item.size, "why": item.why}
                for item in self.doomed
            ],
            "keep": [{"name": name, "why": why} for name, why in self.kept],
            "bytes": self.size,
            "deleted": list(deleted),
        }


def plan_removal(
    storage: Folder,
    entries: Sequence[Entry],
    chosen: Sequence[tuple[Entry, str]],
    unfinished: bool,
) -> Removal:
    """Which of the chosen runs and sweeps can go.

    Args:
        storage: their storage.
        entries: all that it holds.
        chosen: those to delete, each with the reason.
        unfinished: whether also such that the same command would continue.
    """
    going = {entry.name for entry, _ in chosen}
    others = referrers(entries, [entry for entry, _ in chosen])
    kept: dict[str, str] = {}
    for entry, _ in chosen:
        own = entry.why_in_use or (None if unfinished else entry.why_unfinished)
        if own is not None:
            kept[entry.name] = own
    # Who refers to a run keeps it, unless it goes, too; so each that stays may keep more.
    while staying := {
        name: f"{by[0][0]} refers to it ({by[0][1]})"
        for name in going - kept.keys()
        if (by := [each for each in others[name] if each[0] not in going - kept.keys()])
    }:
        kept |= staying
    doomed = [
        Doomed(entry.name, entry.kind, entry.folder.size(), why, entry)
        for entry, why in chosen
        if entry.name not in kept
    ]
    return Removal(storage, doomed, list(kept.items()))


def remove(removal: Removal, progress: Progress) -> tuple[list[str], list[str]]:
    """Delete what a plan says.

    Returns:
        The names of what was deleted, and a line for each of the others: it came into use
        after the plan was made, or cannot be deleted.
    """
    done, left = [], []
    for number, item in enumerate(removal.doomed):
        progress.advance(number, len(removal.doomed))
        progress.status(f"deleting {item.name}")
        try:
            if item.entry is not None:
                remove_entry(removal.storage, item.entry, progress)
            elif not _remove_leftover(removal.storage, item):
                left.append(f"{item.name} is kept: it is in use now")
                continue
        except InputError as error:
            left.append(f"{item.name} is kept: {error}")
        except OSError as error:
            left.append(f"{item.name} cannot be deleted: {reason(error)}; make its folder writable")
        else:
            done.append(item.name)
    return done, left


def remove_entry(storage: Folder, entry: Entry, progress: Progress) -> None:
    """Delete a run or a sweep under its lock.

    Raises:
        InputError: a process uses it, or it has changed since `entry` was read.
    """
    folder = entry.folder
    if not folder.exists():
        return
    with hold_run_lock(folder, threading.Event(), progress):
        now = entry_of(folder)
        if now is not None and now.record != entry.record:
            raise InputError(f"{folder} has changed in the meantime; run the command again")
        if folder.local is None:
            for name in (RUN_FILE, SWEEP_FILE):
                folder.delete(name)
            folder.delete()
            return
        aside = _move_aside(storage, folder)
    aside.delete()
    _drop_if_empty(storage)


def _remove_leftover(storage: Folder, item: Doomed) -> bool:
    """Delete a folder or file that belongs to no run; False if it came into use."""
    place = storage / item.name
    if item.name.startswith(f"{DELETED_FOLDER}/"):
        place.delete()
        _drop_if_empty(storage)
        return True
    if place.local is None:
        if not item.is_still_unused(place):
            return False
        place.delete()
        return True
    if not place.exists():
        return True
    aside = _move_aside(storage, place)
    if not item.is_still_unused(aside):
        with suppress(OSError):  # who uses it has made it again: that one is newer
            aside.move_to(place)
            return False
    aside.delete()
    _drop_if_empty(storage)
    return True


def _move_aside(storage: Folder, folder: Folder) -> Folder:
    aside = storage / DELETED_FOLDER / f"{uuid.uuid4().hex[:8]}-{folder.name}"
    (storage / DELETED_FOLDER).create()
    folder.move_to(aside)
    return aside


def _drop_if_empty(storage: Folder) -> None:
    home = storage / DELETED_FOLDER
    if home.local is not None:
        with suppress(OSError):  # another process deletes there, too
            home.local.rmdir()


def age_of(entry: Entry, now: datetime) -> float | None:
    """Seconds since a run or sweep ended or was last written to; None if that is not recorded."""
    try:
        time = datetime.fromisoformat(entry.ended_at)
    except ValueError:
        return None
    return (now - (time if time.tzinfo else time.replace(tzinfo=UTC))).total_seconds()


def best_of(entries: Iterable[Entry], metric: str, sign: int, keep: int) -> set[str]:
    """Names of the best `keep` runs of each method; runs without a finite value come last."""

    def rank(entry: Entry) -> tuple[bool, float, str]:
        value = (entry.record.get("metrics") or {}).get(metric)
        return (False, sign * value, entry.name) if is_number(value) else (True, 0.0, entry.name)

    ordered = sorted(entries, key=rank)
    names: dict[str, list[str]] = {}
    for entry in ordered:
        names.setdefault(str(entry.record.get("method")), []).append(entry.name)
    return {name for group in names.values() for name in group[:keep]}
