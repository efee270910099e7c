"""The runs of a storage as a whole: finding, noting, comparing and deleting them."""

import difflib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ...training.common.errors import InputError
from ...training.common.formatting import shown
from ...training.common.storage import Folder
from ...training.config.default_storage import default_storage
from ...training.config.paths import resolve_path
from ...training.records.comparison import Comparison, compare_runs
from ...training.records.directions import direction_of
from ...training.records.notes import Note, read_note, write_note
from ...training.records.run_folder import PREPARED_FOLDER, RUN_FILE, read_recipe
from ...tuning.removal import Removal, age_of, best_of, plan_removal
from ...tuning.storage_contents import Entry, contents_of, entry_of
from ...tuning.sweep_folder import SWEEP_FILE, TRIALS_FOLDER
from .results import RunResult


def find_run(run: str, storage: Folder) -> Folder:
    """The folder of a run that is given by its path, its URI or its name in a storage.

    Links of a disk are followed: who refers to a run is looked for where it lies.

    Raises:
        InputError: there is none, or it is a sweep.
    """
    folder = _find(run, storage)
    if not folder.exists(RUN_FILE):
        raise InputError(
            f"{folder} is a sweep, not a run; name one of its trials, such as "
            f"{folder / TRIALS_FOLDER}/trial-0000"
        )
    return folder


def _find(run: str, storage: Folder) -> Folder:
    """The folder of a run or a sweep; for errors see `find_run`."""
    path = Folder(resolve_path(run, Path.cwd()))
    for folder in (path, storage / run):
        if folder.exists(RUN_FILE) or folder.exists(SWEEP_FILE):
            return folder if folder.local is None else Folder(os.path.realpath(folder.local))
    names = [name for name in storage.names() if name != PREPARED_FOLDER and name[0] != "."]
    near = difflib.get_close_matches(run, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else "finray runs lists them"
    raise InputError(f"{shown(run)}: no such run, neither as a path nor in {storage}; {remedy}")


def compare(
    *runs: RunResult | str | os.PathLike[str], storage: str | os.PathLike[str] | None = None
) -> Comparison:
    """Two to six runs side by side: what differs, metrics, curves and answers.

    Args:
        runs: runs, their folders or URIs, or their names in the storage.
        storage: a folder or URI; by default $FINRAY_STORAGE, else `runs`.

    Raises:
        InputError: there is no such run, or one of its files is damaged.
    """
    home = Folder(resolve_path(os.fspath(storage or default_storage()), Path.cwd()))
    return compare_runs(
        [
            Folder(run.uri) if isinstance(run, RunResult) else find_run(os.fspath(run), home)
            for run in runs
        ]
    )


def note_run(folder: Folder, text: str | None, tags: Sequence[str], without: Sequence[str]) -> Note:
    """Write a text and tags about a run; what is not given stays.

    Args:
        folder: the run's folder.
        text: the note; empty removes it, None leaves it.
        tags: tags to add.
        without: tags to remove.

    Raises:
        InputError: the folder holds no run, a tag that is to be removed is not in the note, or
            the note is damaged and no text replaces it.
    """
    try:
        before = read_note(folder)
    except InputError:
        if text is None:
            raise
        before = Note()  # the text replaces a note that is damaged
    foreign = [tag for tag in without if tag not in before.tags]
    if foreign:
        raise InputError(
            f"--untag {foreign[0]}: {folder.name} has no such tag in its note; tags of its recipe "
            "(log.tags) stay with it"
        )
    kept = [tag for tag in dict.fromkeys((*before.tags, *tags)) if tag not in without]
    note = Note(before.text if text is None else text.strip(), tuple(kept))
    write_note(folder, note)
    return note


def plan_rm(runs: Sequence[str], storage: Folder, unfinished: bool) -> Removal:
    """What `finray runs rm` deletes.

    Raises:
        InputError: there is no such run, or it belongs to a sweep.
    """
    chosen: dict[str, Entry] = {}
    home = storage
    for run in runs:
        folder = _find(run, storage)
        parent = folder.parent
        grandparent = parent.parent
        if grandparent.exists(SWEEP_FILE):
            raise InputError(
                f"{folder}: a trial of the sweep {grandparent.name}; remove the sweep as a whole"
            )
        if chosen and parent.uri != home.uri:
            raise InputError(f"{folder} and {home} are two storages; remove one after the other")
        home = parent
        entry = entry_of(folder)
        assert entry is not None
        chosen[entry.name] = entry
    return plan_removal(
        home, contents_of(home), [(entry, _state(entry)) for entry in chosen.values()], unfinished
    )


def plan_prune(
    storage: Folder,
    *,
    keep_best: int | None,
    by: str,
    older_than: float | None,
    unfinished: bool,
) -> Removal:
    """What `finray runs prune` deletes: runs, no sweeps.

    Args:
        storage: the storage.
        keep_best: of each method's runs, how many of the best stay; None: none for that reason.
        by: the metric that decides on the best.
        older_than: seconds since a run's end from which on it may go; None: at any age.
        unfinished: whether runs that can be continued may go, too.

    Raises:
        InputError: neither rule is given, no run has the metric, it is not known which direction of
            it is better, or a recipe that decides is damaged.
    """
    if keep_best is None and older_than is None:
        raise InputError("runs prune: no rule says which runs; give --keep-best or --older-than")
    if keep_best is not None and keep_best < 0:
        raise InputError(f"--keep-best: {keep_best} is below 0; give the number of runs to keep")
    entries = contents_of(storage)
    every = [entry for entry in entries if entry.kind == "run"]
    runs = [run for run in every if run.problem is None]
    best = set() if keep_best is None or not runs else _best(runs, by, keep_best)
    now = datetime.now(UTC)
    chosen, kept = [], [(run.name, run.problem) for run in every if run.problem is not None]
    for run in runs:
        age = age_of(run, now)
        if run.name in best:
            kept.append((run.name, f"among the best {keep_best} by {by}"))
        elif older_than is not None and (age is None or age < older_than):
            kept.append((run.name, "no time is recorded" if age is None else "younger"))
        else:
            is_measured = keep_best is None or by in (run.record.get("metrics") or {})
            chosen.append((run, _state(run) if is_measured else f"{_state(run)}, no {by}"))
    removal = plan_removal(storage, entries, chosen, unfinished)
    return Removal(storage, removal.doomed, [*kept, *removal.kept])


def _best(runs: Sequence[Entry], by: str, keep: int) -> set[str]:
    """Names of the best runs of each method."""
    has = {key for run in runs for key in run.record.get("metrics") or {}}
    if by not in has:
        existing = f"; there are {', '.join(sorted(has))}" if has else ""
        raise InputError(f"--by {by}: no run has this metric{existing}")
    measured = [run for run in runs if by in (run.record.get("metrics") or {})]
    mode = direction_of(by, (read_recipe(run.folder)[1] for run in measured))
    if mode is None:
        raise InputError(
            f"--by {by}: the recipes of these runs do not say, or do not agree, which direction is "
            "better; give another metric, or name the runs to finray runs rm"
        )
    return best_of(runs, by, -1 if mode == "max" else 1, keep)


def plan_clean(storage: Folder, older_than: float) -> Removal:
    """What `finray clean` deletes.

    Args:
        storage: the storage.
        older_than: seconds for which a thing must not have been used.

    Raises:
        InputError: the record of a run is damaged: what it refers to is not known.
    """
    from ...tuning.leftovers import Leftovers

    return Leftovers(storage, contents_of(storage), older_than).plan()


def _state(entry: Entry) -> str:
    return f"{entry.status}, {entry.ended_at[:10] or 'no time recorded'}"
