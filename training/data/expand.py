"""Finds the files of a source, and which of their rows it uses."""

from dataclasses import dataclass

from ..common.errors import InputError, reason
from ..common.formatting import one_line
from ..common.storage import Folder
from ..config.source import Source
from .hub import hub_splits, pinned_address
from .sources import SourceFile, check_not_empty, find_files, is_data_folder
from .splits import TRAIN, select, splits_of, take_rows


@dataclass(frozen=True)
class Expanded:
    """The files of a source."""

    files: tuple[SourceFile, ...]
    commit: str | None = None
    """The commit of a data set of the hub."""
    unread_splits: tuple[str, ...] = ()
    """Splits beside the one that is read."""


def expand(source: Source) -> Expanded:
    """All data files of a source, sorted by path.

    Raises:
        InputError: the path or data set does not exist, has no data file, a file is empty or of an
            unknown kind, the split does not exist or is empty, or the store cannot be reached.
    """
    try:
        expanded = _of_dataset(source) if source.dataset is not None else _of_path(source)
        if source.limit is None:
            return expanded
        files = take_rows(expanded.files, 0, source.limit)
        if not files:
            raise InputError(
                f"{expanded.files[0].place}: the file has no rows; expected at least one"
            )
    except OSError as error:
        raise InputError(
            f"{one_line(source.place)}: cannot read it: {reason(error)}; check that it is there, "
            "and its permissions"
        ) from None
    return Expanded(tuple(files), expanded.commit, expanded.unread_splits)


def _of_dataset(source: Source) -> Expanded:
    assert source.dataset is not None
    commit, splits = hub_splits(source.dataset, source.subset, source.revision)
    files = select(splits, source.split, source.dataset)
    return Expanded(tuple(files), commit, _others(list(splits), source.split))


def _of_path(source: Source) -> Expanded:
    path, commit = pinned_address(source.place)
    if not is_data_folder(path):
        if source.split is not None or source.subset is not None:
            key = "split" if source.split is not None else "subset"
            raise InputError(
                f"{key}: {path} is not a folder, so it has no {key}s; remove {key}, or name the "
                "folder"
            )
        return Expanded(tuple(find_files(path)), commit)
    splits = splits_of(Folder(path.rstrip("/")), source.subset)
    if not any(splits.values()):
        find_files(path)  # raises: it says what is missing
    check_not_empty(file for files in splits.values() for file in files)
    files = select(splits, source.split, path)
    return Expanded(tuple(files), commit, _others(list(splits), source.split))


def _others(splits: list[str], requested: str | None) -> tuple[str, ...]:
    """The splits that are not read."""
    if requested is None:
        requested = TRAIN if TRAIN in splits else splits[0]
    named = {part.partition("[")[0].strip() for part in requested.split("+")}
    return tuple(name for name in splits if name not in named)
