"""Resolves a recipe's sources: their files, and the format of their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..common.errors import InputError
from ..config.recipe import Recipe
from ..config.sections import Source
from .formats import KnownFormat, detect_format
from .reading import BadRow, Row, read_chunk
from .sources import SourceFile, expand, plan_chunks

_ROWS_CHECKED = 20


@dataclass(frozen=True)
class ResolvedSource:
    """A source with its files and the format of its rows."""

    path: str
    weight: float
    files: tuple[SourceFile, ...]
    format: KnownFormat


@dataclass(frozen=True)
class ResolvedData:
    """The resolved sources of a recipe, for training and for evaluation."""

    train: tuple[ResolvedSource, ...]
    eval: tuple[ResolvedSource, ...]


def resolve_data(recipe: Recipe) -> ResolvedData:
    """Find the files of all sources, and the formats of their rows.

    Raises:
        InputError: see `resolve_source`.
    """
    return ResolvedData(
        tuple(map(resolve_source, recipe.data.train)), tuple(map(resolve_source, recipe.data.eval))
    )


def resolve_source(source: Source) -> ResolvedSource:
    """Find a source's files and detect its format.

    Raises:
        InputError: files are missing, empty or damaged, or none of the first rows is readable or
            fits a format.
    """
    files = tuple(expand(source))
    return ResolvedSource(source.path, source.weight, files, _format(source, files))


def all_rows(files: tuple[SourceFile, ...]) -> Iterator[tuple[str, Row | BadRow]]:
    """Iterate over (file:line, row) of a source; files are read lazily."""
    for file in files:
        before = 0
        for chunk in plan_chunks(file):
            content = read_chunk(chunk)
            for line, row in content.rows:
                yield f"{file.uri}:{before + line}", row
            before += content.lines


def _format(source: Source, files: tuple[SourceFile, ...]) -> KnownFormat:
    if source.format != "auto":
        return source.format
    rows = list(islice(all_rows(files), _ROWS_CHECKED))
    good = [(place, row) for place, row in rows if not isinstance(row, BadRow)]
    if good:
        return detect_format(good)
    for place, row in rows:
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}; none of the first rows can be read")
    raise InputError(f"{files[0].uri}: the file has no rows; expected at least one")
