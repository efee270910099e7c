"""Finds what a user names: a finished run, a checkpoint of one, a model's folder or a hub id."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import InputError
from ..common.storage import Folder
from ..config.adapter_folder import CONFIG_FILE
from ..config.default_storage import default_storage
from ..config.paths import is_folder, resolve_path
from ..config.recipe import Recipe
from ..records.checkpoint import best, newest
from ..records.resume import written_recipe
from ..records.run_folder import (
    CHECKPOINTS_FOLDER,
    FinishedRun,
    Record,
    finished_run,
    list_runs,
    read_run,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CHECKPOINT = re.compile(r"step-\d{8}")
_SHOWN = 10


class UnfinishedRun(InputError):
    """The run that a user names is not finished, but has a checkpoint."""

    def __init__(self, message: str = "", checkpoint: str = "") -> None:
        super().__init__(message)
        self.checkpoint = checkpoint
        """The folder of its best checkpoint."""


@dataclass(frozen=True)
class Located:
    """A run, a checkpoint of a run, or a model; nothing of it is loaded yet."""

    name: str
    """The model's name in tables."""
    uri: str
    """Its folder or URI, or the hub id."""
    folder: Folder | None = None
    """The run's folder; None for a model."""
    recipe: Recipe | None = None
    """The run's recipe; None for a model."""
    run: FinishedRun | None = None
    """The run, if it is finished."""
    checkpoint: Folder | None = None
    """The checkpoint, if one is named."""

    @property
    def identity(self) -> str:
        """Changes when a run of this name is another one."""
        record = {} if self.run is None else self.run.record
        return f"{self.uri} {record.get('finished_at') or ''}".strip()


def locate(name: str, folder: Path) -> Located:
    """Find a run or a model.

    Args:
        name: a run's folder or URI, its name in the default storage, a checkpoint's folder, a
            folder with a model or an adapter, or a hub id (owner/name, owner/name@revision).
        folder: where relative paths start.

    Raises:
        UnfinishedRun: the run has a checkpoint, but is not finished.
        InputError: there is neither, with the runs that there are; or this finray does not take
            the run's recipe.
    """
    path = resolve_path(name, folder)
    storage = resolve_path(default_storage(), folder)
    places = [path] if "/" in name else [path, str(Folder(storage) / name)]
    for place in places:
        if "://" in place or is_folder(place):
            run_folder = Folder(place)
            record = read_run(run_folder)
            if record is not None:
                return _of_run(run_folder, record)
    if _is_checkpoint(path):
        return _of_checkpoint(Folder(path))
    if "://" not in path and is_folder(path):
        if any((Path(path) / file).is_file() for file in ("config.json", CONFIG_FILE)):
            return Located(Path(path).name, path)
        raise InputError(f"{path} holds neither a run nor a model{_those_there(path, storage)}")
    if _HUB_ID.fullmatch(name) and not is_folder(Path(path).parent):
        return Located(name, name)
    raise InputError(f"there is no run {name}{_those_there(Folder(path).parent.uri, storage)}")


def _is_checkpoint(path: str) -> bool:
    if "://" not in path:
        return _CHECKPOINT.fullmatch(Path(path).name) is not None and is_folder(path)
    folder = Folder(path)
    return _CHECKPOINT.fullmatch(folder.name) is not None and bool(folder.names())


def _of_run(folder: Folder, record: Record) -> Located:
    recipe = written_recipe(folder)
    _check_speaks(folder, recipe)
    if record.get("status") != "finished":
        checkpoints = folder / CHECKPOINTS_FOLDER
        chosen = best(checkpoints, recipe.watched) or newest(checkpoints)
        if chosen is not None:
            place = str(checkpoints / chosen)
            raise UnfinishedRun(
                f"{folder}: the run is not finished (status: {record.get('status')}, step "
                f"{record.get('step')} of {record.get('total_steps')}); its best checkpoint is "
                f"{place}, which can be named instead; `finray train` with its recipe resumes it",
                place,
            )
    run = finished_run(folder)
    return Located(folder.name, folder.uri, folder, recipe, run)


def _of_checkpoint(checkpoint: Folder) -> Located:
    folder = checkpoint.parent.parent
    if read_run(folder) is None:
        raise InputError(
            f"{checkpoint} is not a checkpoint of a run: {folder} holds none; correct the path"
        )
    recipe = written_recipe(folder)
    _check_speaks(folder, recipe)
    name = f"{folder.name} {checkpoint.name}"
    return Located(name, checkpoint.uri, folder, recipe, checkpoint=checkpoint)


def _check_speaks(folder: Folder, recipe: Recipe) -> None:
    if recipe.method.head != "causal":
        raise InputError(
            f"{folder}: a run of method {recipe.method.kind} scores texts and writes none; name a "
            "run of another method"
        )


def _those_there(*storages: str) -> str:
    """The runs of the first of some folders that holds any, for a message."""
    for storage in storages:
        if "://" in storage or is_folder(storage):
            runs = list_runs(Folder(storage))
            names = [name for name, _ in runs]
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                return f"; those in {storage}: {', '.join(names[:_SHOWN])}{more}"
    return "; give a run's folder, a model's folder or a hub id (owner/name)"
