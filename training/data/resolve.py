"""Resolves a recipe's sources: their files, and the format of their rows."""

import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ..common.errors import InputError
from ..config.curation import DeduplicateStage
from ..config.places import about
from ..config.recipe import Recipe
from ..config.source import KnownFormat, Source
from .contents import identified
from .expand import expand
from .formats import detect_format
from .hub import pinned
from .reading import read_chunk
from .row_changes import UNCHANGED, RowChanges, change_rows
from .rows import BadRow, Row
from .sources import MOST_ROWS, Rows, SourceFile, plan_chunks

_ROWS_CHECKED = 20
_COMMIT_DIGITS = 12
_FILES_SHOWN = 3
_IN_JSON = re.compile(r"\.json(?:\.gz|\.zst)?:\d+\Z", re.IGNORECASE)
_JSON_HOLDS = "; a .json file holds an array, an object whose data is one, or an object a line"


@dataclass(frozen=True)
class ResolvedSource:
    """A source with its files and the format of its rows."""

    path: str
    """The source in messages: its path or data set, with what of it is read."""
    weight: float
    files: tuple[SourceFile, ...]
    format: KnownFormat
    changes: RowChanges = UNCHANGED
    commit: str | None = None
    """The commit of a data set of the hub."""
    unread_splits: tuple[str, ...] = ()
    """Splits of the folder or data set that no source reads."""

    @property
    def bytes(self) -> int:
        """Size of the files, as stored."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class ResolvedData:
    """The resolved sources of a recipe, for training and for evaluation."""

    train: tuple[ResolvedSource, ...]
    eval: tuple[ResolvedSource, ...]


def resolve_data(recipe: Recipe) -> ResolvedData:
    """Find the files of all sources, and the formats of their rows.

    Raises:
        InputError: see `resolve_source`; with the source's key.
    """
    data = recipe.data
    train = _resolve_all(data.train, recipe, "data.train")
    held_out = _resolve_all(data.eval, recipe, "data.eval")
    places = [
        (source.place, source.subset, source.revision) for source in (*data.train, *data.eval)
    ]
    unread = _unread(places, [source.unread_splits for source in (*train, *held_out)])
    return ResolvedData(
        tuple(map(_with_unread, train, unread)),
        tuple(map(_with_unread, held_out, unread[len(train) :])),
    )


def identified_data(recipe: Recipe) -> ResolvedData:
    """As `resolve_data`, with what identifies the content of each file: what a preparation reads is
    compared with it.

    Raises:
        InputError: see `resolve_data`; or a file cannot be read.
    """
    data = resolve_data(recipe)
    at_once = not recipe.data.streams
    return ResolvedData(
        tuple(replace(each, files=identified(each.files, at_once)) for each in data.train),
        tuple(replace(each, files=identified(each.files)) for each in data.eval),
    )


def read_twice(recipe: Recipe, data: ResolvedData) -> list[str]:
    """What to say of training files whose rows two sources read in the same way, as a glob and a
    name do; nothing if a stage drops equal rows."""
    if any(isinstance(stage, DeduplicateStage) for stage in recipe.data.curate):
        return []
    seen: dict[Hashable, list[Rows]] = {}
    repeats: dict[int, list[str]] = {}
    for number, source in enumerate(data.train):
        for file in source.files:
            own, key = file.rows or (0, MOST_ROWS), (file.real, source.format, source.changes)
            earlier = seen.setdefault(key, [])
            if any(own[0] < stop and start < own[1] for start, stop in earlier):
                repeats.setdefault(number, []).append(file.place)
            earlier.append(own)
    return [
        f"data.train.{number} reads again what is read already, so that its rows are used twice: "
        + ", ".join(files[:_FILES_SHOWN])
        + (f" and {len(files) - _FILES_SHOWN} more files" if len(files) > _FILES_SHOWN else "")
        for number, files in repeats.items()
    ]


def _unread(places: Sequence[Hashable], splits: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """For each source the splits that no source of the same place reads, named once a place."""
    return [
        tuple(
            name
            for name in splits[n]
            if place not in places[:n]
            and all(name in splits[m] for m, other in enumerate(places) if other == place)
        )
        for n, place in enumerate(places)
    ]


def _with_unread(source: ResolvedSource, unread: tuple[str, ...]) -> ResolvedSource:
    return replace(source, unread_splits=unread)


def _resolve_all(sources: Sequence[Source], recipe: Recipe, key: str) -> tuple[ResolvedSource, ...]:
    resolved = []
    for index, source in enumerate(sources):
        with about(f"{key}.{index}"):
            resolved.append(resolve_source(source, recipe))
    return tuple(resolved)


def resolve_source(source: Source, recipe: Recipe) -> ResolvedSource:
    """Find a source's files, and detect its format as the recipe's method reads it.

    Raises:
        InputError: files are missing, empty or damaged, or none of the first rows is readable or
            fits a format.
    """
    expanded = expand(source)
    changes = RowChanges.of(source)
    return ResolvedSource(
        path=_label(source, expanded.commit),
        weight=source.weight,
        files=expanded.files,
        format=_format(source, expanded.files, changes, recipe),
        changes=changes,
        commit=expanded.commit,
        unread_splits=expanded.unread_splits,
    )


def _label(source: Source, commit: str | None) -> str:
    """The source's label, with the commit that its revision is now."""
    if commit is None:
        return source.label
    return pinned(source, commit[:_COMMIT_DIGITS]).label


def all_rows(
    files: tuple[SourceFile, ...], changes: RowChanges, max_bytes: int
) -> Iterator[tuple[str, Row | BadRow]]:
    """Iterate over (file:line, row) of a source; files are read lazily.

    Args:
        files: its files.
        changes: what is done with each row; rows that are left out do not appear.
        max_bytes: data.max_row_bytes.
    """
    for file in files:
        before = 0
        for chunk in plan_chunks(file):
            content = read_chunk(chunk, max_bytes)
            for line, row in change_rows(content.rows, changes):
                if row is not None:
                    yield f"{file.place}:{before + line}", row
            before += content.lines


def _format(
    source: Source, files: tuple[SourceFile, ...], changes: RowChanges, recipe: Recipe
) -> KnownFormat:
    if source.format != "auto":
        return source.format
    rows = list(islice(all_rows(files, changes, recipe.data.max_row_bytes), _ROWS_CHECKED))
    good = [(place, row) for place, row in rows if not isinstance(row, BadRow)]
    if good:
        return detect_format(good, recipe.method.kind)
    for place, row in rows:
        if isinstance(row, BadRow):
            is_json = row.reason.startswith("not valid JSON") and _IN_JSON.search(place)
            raise InputError(
                f"{place}: {row.reason}; none of the first rows can be read"
                + (_JSON_HOLDS if is_json else "")
            )
    raise without_rows(files, changes)


def without_rows(files: Sequence[SourceFile], changes: RowChanges) -> InputError:
    """The error of a source without a row."""
    if changes.function is not None:
        return InputError(
            f"map: {changes.function.name} leaves out every row; let it return those to learn from"
        )
    return InputError(f"{files[0].place}: the file has no rows; expected at least one")
