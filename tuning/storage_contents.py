"""The runs and sweeps of a storage, and who refers to whom.

A recipe names a run by a path somewhere in its settings: an adapter, a base, a reference, a reward
model, a file of rows. So every text in it is compared with the folders of the storage; no list of
keys has to be kept.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from ..training.common.errors import InputError
from ..training.common.formatting import count
from ..training.common.lock import holder_of
from ..training.common.storage import Folder
from ..training.common.yaml_text import load_yaml
from ..training.records.resume import has_checkpoints
from ..training.records.run_folder import (
    PREPARED_FOLDER,
    RECIPE_FILE,
    UNREADABLE,
    Record,
    read_if_there,
    read_listed,
    read_run,
    unreadable,
)
from .sweep_folder import BEST_FILE, RETRAINED_FOLDER, SWEEP_FILE, TRIALS_FOLDER, read_sweep

Referrers = dict[str, list[tuple[str, str]]]
"""By name: the names of those that refer to it, each with the place, recipe.yaml: model.adapter."""


_WAYS = "continues it, --unfinished deletes it"
_SAME_SCHEMES = {"gcs": "gs", "abfss": "abfs"}


@dataclass(frozen=True)
class Entry:
    """A run or a sweep of a storage."""

    folder: Folder
    kind: Literal["run", "sweep"]
    record: Record
    """Content of run.json or sweep.json; for an unreadable one as `read_listed` gives it."""

    @property
    def name(self) -> str:
        """Its name, which is its folder's."""
        return self.folder.name

    @property
    def status(self) -> str:
        """running, finished, stopped, failed, unreadable or unknown."""
        return str(self.record.get("status") or "unknown")

    @property
    def problem(self) -> str | None:
        """What is wrong with an unreadable record, and what to do; None for one that is read."""
        return str(self.record["problem"]) if self.status == UNREADABLE else None

    @property
    def ended_at(self) -> str:
        """When it ended, or was last heard of; ISO 8601, empty if that is not recorded."""
        keys = ("finished_at", "updated_at", "started_at")
        return str(next((self.record[key] for key in keys if self.record.get(key)), ""))

    @property
    def why_in_use(self) -> str | None:
        """The process that holds it, or that a newer finray wrote it; None if neither does."""
        if self.record.get("is_whole"):
            return self.problem
        holder = holder_of(self.folder)
        return f"in use by {holder}" if holder else None

    @property
    def why_unfinished(self) -> str | None:
        """How far it is, if the same command would continue it; None if there is nothing left.
        Of an unreadable one that is not known."""
        if self.problem is not None:
            return f"{self.problem}; --unfinished deletes it"
        if self.status == "finished":
            return None
        if self.kind == "sweep":
            return f"{self.status}; finray tune {_WAYS}"
        if not has_checkpoints(self.folder):
            return None
        step, total = self.record.get("step"), self.record.get("total_steps")
        return f"{self.status} at step {count(step)} of {count(total)}; finray train {_WAYS}"

    @property
    def prepared(self) -> set[str]:
        """The names of the prepared data sets that it was trained on.

        Raises:
            InputError: its record, or that of one of its trials, cannot be read.
        """
        if self.problem is not None:
            raise InputError(self.problem)
        own = self.record.get("prepared")
        names = set(own) if isinstance(own, list) else {own} if own else set()
        for run in self._runs_inside():
            names |= {str((read_run(run) or {}).get("prepared"))}
        return names

    def recipes(self) -> Iterator[tuple[str, str]]:
        """(name, text) of its files that name other folders: recipes, and a sweep's own record."""
        inside = (SWEEP_FILE, BEST_FILE) if self.kind == "sweep" else (RECIPE_FILE,)
        for name in inside:
            yield name, self._text(self.folder, name)
        for run in self._runs_inside():
            yield f"{run.name}/{RECIPE_FILE}", self._text(run, RECIPE_FILE)

    def _text(self, folder: Folder, name: str) -> str:
        """A file's text; empty where there is none, or none of an unreadable run can be read.

        Raises:
            InputError: a file of a readable one cannot be read.
        """
        try:
            content = read_if_there(folder, name)
        except InputError:
            if self.problem is None:
                raise
            content = None
        return (content or b"").decode("utf-8", "replace")

    def _runs_inside(self) -> Iterator[Folder]:
        if self.kind == "sweep":
            for group in (TRIALS_FOLDER, RETRAINED_FOLDER):
                for name in (self.folder / group).names():
                    yield self.folder / group / name


def entry_of(folder: Folder) -> Entry | None:
    """The run or sweep in a folder; None if it holds none."""
    record = read_listed(folder)
    if record is not None:
        return Entry(folder, "run", record)
    if folder.exists(SWEEP_FILE):
        return Entry(folder, "sweep", _sweep_record(folder))
    return None


def _sweep_record(folder: Folder) -> Record:
    """As `read_listed`, of a sweep."""
    try:
        return read_sweep(folder) or {}
    except InputError as error:
        return unreadable(error)


def contents_of(storage: Folder) -> list[Entry]:
    """The runs and sweeps of a storage, by name."""
    names = [name for name in storage.names() if name != PREPARED_FOLDER]
    entries = (entry_of(storage / name) for name in names if not name.startswith("."))
    return [entry for entry in entries if entry is not None]


def referrers(entries: Sequence[Entry], targets: Sequence[Entry]) -> Referrers:
    """Who refers to these runs and sweeps.

    Args:
        entries: all runs and sweeps of the storage.
        targets: those that are asked about.

    Raises:
        InputError: a recipe is not YAML, or cannot be read: what it refers to is not known.
    """
    mentions: Referrers = {target.name: [] for target in targets}
    for entry in entries:
        for file, text in entry.recipes():
            mentioned = [other for other in targets if other.name in text and other != entry]
            if file == SWEEP_FILE and entry.problem is not None:
                for target in mentioned:  # in which setting is not known
                    mentions[target.name].append((entry.name, f"{file}, which cannot be read"))
                continue
            if not mentioned:
                continue
            values = _parsed(entry, file, text)
            places = _paths(values)
            storage = values.get("storage") if isinstance(values, dict) else None
            for target in mentioned:
                keys = [key for key, path in places if _is_inside(path, target.folder, storage)]
                if keys:
                    mentions[target.name].append((entry.name, f"{file}: {keys[0]}"))
    return mentions


def _parsed(entry: Entry, file: str, text: str) -> Any:
    try:
        return entry.record if file == SWEEP_FILE else load_yaml(text)
    except yaml.YAMLError:
        raise InputError(
            f"{entry.folder / file}: not a YAML file, so it is not known what it refers to; "
            "restore it, or delete that folder"
        ) from None


def _paths(values: Any, key: str = "") -> list[tuple[str, str]]:
    """(key, text) of every text that may be a path."""
    if isinstance(values, dict):
        items = [(f"{key}.{name}" if key else str(name), value) for name, value in values.items()]
        return [pair for name, value in items for pair in _paths(value, name)]
    if isinstance(values, list):
        return [pair for value in values for pair in _paths(value, key)]
    return [(key, values)] if isinstance(values, str) and "/" in values else []


def _is_inside(path: str, folder: Folder, storage: object) -> bool:
    """True if a path leads to a folder of the storage, or did where the storage was before."""
    place = _place(path)
    if _below(place, _place(folder.uri)):
        return True
    return isinstance(storage, str) and _below(place, _place((Folder(storage) / folder.name).uri))


def _place(text: str) -> str:
    """A path or URI such that two of one place are equal: without links, query and key."""
    if "://" not in text:
        return os.path.realpath(text)
    address = text.partition("?")[0]
    if address.startswith("file://"):
        return os.path.realpath(Folder(address).path)
    scheme, _, rest = address.partition("://")
    scheme = _SAME_SCHEMES.get(scheme, scheme)
    if scheme in ("s3", "gs"):  # s3://KEY:SECRET@bucket; abfs has its container there
        host, slash, below = rest.partition("/")
        rest = f"{host.rpartition('@')[2]}{slash}{below}"
    return f"{scheme}://{rest.rstrip('/')}"


def _below(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder.rstrip('/')}/")
