"""What lies in a storage and no run needs: prepared data, stages, windows, rehearsals, remains.

A process that is about to train on prepared data is in no run.json yet. So whatever was used within
the last day stays: `prepare` says when it opens a data set or a stage (`Folder.touch`).
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial

from pydantic import ValidationError

from ..training.common.errors import InputError
from ..training.common.formatting import duration
from ..training.common.lock import LOCK_FILE, STALE_SECONDS
from ..training.common.storage import Folder
from ..training.common.yaml_text import load_yaml
from ..training.config.model_folder import model_folder
from ..training.config.recipe import Recipe, recipe_from_dict
from ..training.data.curation.files import STAGES
from ..training.data.prepared import STAGES_FILE, DamagedDataError, open_prepared
from ..training.data.window_files import WINDOWS_FOLDER, is_window
from ..training.records.run_folder import PREPARED_FOLDER
from ..training.rehearsal.child import REHEARSALS
from ..training.rehearsal.key import key_of
from .removal import DELETED_FOLDER, Doomed, Removal
from .storage_contents import Entry

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}|lock\.json\.[0-9a-f]{32}|manifest\.json\.[0-9a-f]{32}")
"""Files of writes that were cut off."""
_ATTEMPT = re.compile(r"[0-9a-f]{32}")


class Leftovers:
    """What no run or sweep of a storage refers to.

    Args:
        storage: the storage.
        entries: all its runs and sweeps.
        seconds: how long a thing must not have been used.
    """

    def __init__(self, storage: Folder, entries: Sequence[Entry], seconds: float) -> None:
        self._storage = storage
        self._home = storage / PREPARED_FOLDER
        self._entries = entries
        self._seconds = seconds
        self._kept: list[tuple[str, str]] = []
        self._going: set[str] = set()
        """Names of the data sets that may go; their stages may, too."""

    def plan(self) -> Removal:
        """All that may go, with sizes.

        Raises:
            InputError: a run's record is damaged: what it refers to is not known.
        """
        parts = (
            *(self._deleted(), self._sets(), self._stages(), self._windows()),
            *(self._rehearsals(), self._cut_off()),
        )
        doomed = [item for part in parts for item in part]
        return Removal(self._storage, doomed, self._kept)

    def _deleted(self) -> Iterator[Doomed]:
        for name in (self._storage / DELETED_FOLDER).names():
            place = f"{DELETED_FOLDER}/{name}"
            size = self._storage.size(place)
            yield Doomed(place, "deleted", size, "its deletion was interrupted")

    def _set_names(self) -> list[str]:
        others = (STAGES, REHEARSALS)
        return [
            name for name in self._home.names() if name not in others and not name.startswith(".")
        ]

    def _sets(self) -> Iterator[Doomed]:
        users: dict[str, list[str]] = {}
        for entry in self._entries:
            for name in entry.prepared:
                users.setdefault(name, []).append(entry.name)
        for name in self._set_names():
            place = f"{PREPARED_FOLDER}/{name}"
            by = users.get(name)
            if by:
                self._kept.append((place, f"{by[0]} was trained on it"))
                yield from self._in_a_set(name)
            elif (item := self._unused(place, "prepared data")) is not None:
                self._going.add(name)
                yield item

    def _in_a_set(self, name: str) -> Iterator[Doomed]:
        """Attempts of killed processes, and damaged files, beside the valid ones."""
        folder = self._home / name
        try:
            prepared = open_prepared(folder)
        except DamagedDataError:
            return
        valid = prepared.manifest.attempt if prepared else None
        for inside in folder.names():
            if _ATTEMPT.fullmatch(inside) and inside != valid:
                item = self._unused(f"{PREPARED_FOLDER}/{name}/{inside}", "attempt")
                if item is not None:
                    yield item

    def _stages(self) -> Iterator[Doomed]:
        """Stages of no data set that is left; all stay if a set does not say which it came from."""
        needed: set[str] = set()
        for name in filter(lambda name: name not in self._going, self._set_names()):
            folder = self._home / name
            try:
                needed |= set(json.loads(folder.read(STAGES_FILE)))
            except FileNotFoundError:
                if self._was_curated(folder):
                    return
        for name in (self._home / STAGES).names():
            place = f"{PREPARED_FOLDER}/{STAGES}/{name}"
            if name in needed:
                continue
            if (item := self._unused(place, "stage of curation")) is not None:
                yield item

    def _was_curated(self, folder: Folder) -> bool:
        try:
            prepared = open_prepared(folder)
        except DamagedDataError:
            return True
        return prepared is not None and bool(prepared.manifest.funnel)

    def _windows(self) -> Iterator[Doomed]:
        """Windows of streamed data that the driver of a run left when it was killed: the next one
        makes its own. What they count, and their lists of bad rows, stay."""
        for entry in self._entries:
            home = f"{entry.name}/{WINDOWS_FOLDER}"
            windows = [name for name in (self._storage / home).names() if is_window(name)]
            if windows and (by := self._driver_of(entry)) is not None:
                self._kept.append((home, by))
                continue
            why = "its run does not train, and makes its windows again"
            for name in windows:
                if (item := self._unused(f"{home}/{name}", "window", why)) is not None:
                    yield item

    def _driver_of(self, entry: Entry) -> str | None:
        """Who prepares windows of a run; of a driver on another machine only its lock is seen."""
        if entry.why_in_use is not None:
            return entry.why_in_use
        renewed = self._storage.newest(f"{entry.name}/{LOCK_FILE}")
        is_held = renewed is not None and time.time() - renewed < STALE_SECONDS
        return "its lock was renewed just now" if is_held else None

    def _rehearsals(self) -> Iterator[Doomed]:
        """Outcomes that a start of none of the runs would look up with today's libraries."""
        names = (self._home / REHEARSALS).names()
        needed = {f"{key}.json" for recipe in self._recipes() for key in _keys(recipe)}
        for name in names if names else ():
            if name not in needed:
                place = f"{PREPARED_FOLDER}/{REHEARSALS}/{name}"
                if (item := self._unused(place, "rehearsal")) is not None:
                    yield item

    def _recipes(self) -> Iterator[Recipe]:
        if not (self._home / REHEARSALS).names():
            return
        for entry in self._entries:
            for _, text in entry.recipes():
                try:
                    yield recipe_from_dict(load_yaml(text))
                except (ValidationError, ValueError, TypeError):
                    continue  # another finray's recipe, or no recipe: none here would start it

    def _cut_off(self) -> Iterator[Doomed]:
        places = ["", PREPARED_FOLDER, *(entry.name for entry in self._entries)]
        for place in places:
            folder = self._storage / place if place else self._storage
            for name in folder.names():
                path = f"{place}/{name}" if place else name
                is_cut_off = _TEMPORARY.fullmatch(name) is not None
                if is_cut_off and (item := self._unused(path, "unfinished write")) is not None:
                    yield item

    def _unused(self, place: str, kind: str, reason: str = "no run refers to it") -> Doomed | None:
        """The thing, if it was not used lately; what is kept for that is noted."""
        newest = self._storage.newest(place)
        age = None if newest is None else time.time() - newest
        if age is None or age < self._seconds:
            self._kept.append((place, f"used {duration(age or 0.0)} ago"))
            return None
        why = f"{reason}; last used {duration(age)} ago"
        same = partial(_is_as_old, newest=newest)
        return Doomed(place, kind, self._storage.size(place), why, is_still_unused=same)


def _is_as_old(place: Folder, newest: float | None) -> bool:
    now = place.newest()
    return now is None or newest is None or now <= newest


def _keys(recipe: Recipe) -> Iterator[str]:
    """The keys that a recipe's rehearsal may have, where its model's configuration is on this
    machine. A run's recipe says of checkpointing what was decided, also where it was left open."""
    is_open = recipe.model.model_copy(update={"gradient_checkpointing": "auto"})
    try:
        folder = model_folder(recipe.model, only_cached=True)
        if folder is not None:
            yield key_of(recipe, folder)
            yield key_of(recipe.model_copy(update={"model": is_open}), folder)
    except (InputError, OSError, ValueError):
        return  # its model or adapter is gone, and with it the outcome's use
