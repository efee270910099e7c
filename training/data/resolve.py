"""A recipe's sources, resolved: their files, and the format of their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..common.errors import InputError
from ..config.recipe import Recipe
from ..config.sections import Source
from .formats import KnownFormat, detect_format
from .reading import BadRow, Row, read_chunk
from .sources import SourceFile, expand, plan_chunks

_ROWS_LOOKED_AT = 20


@dataclass(frozen=True)
class ResolvedSource:
    """A source whose files were found and whose rows were looked at."""

    path: str
    weight: float
    files: tuple[SourceFile, ...]
    format: KnownFormat


@dataclass(frozen=True)
class ResolvedData:
    """A recipe's sources, resolved."""

    train: tuple[ResolvedSource, ...]
    eval: tuple[ResolvedSource, ...]


def resolve_data(recipe: Recipe) -> ResolvedData:
    """Find the files of all sources, and the formats of their rows.

    Raises:
        InputError: as `resolve_source`.
    """
    return ResolvedData(
        tuple(map(resolve_source, recipe.data.train)), tuple(map(resolve_source, recipe.data.eval))
    )


def resolve_source(source: Source) -> ResolvedSource:
    """Find a source's files and detect its format.

    Raises:
        InputError: for missing, empty or damaged files, and where none of the first rows is
            readable or fits a format.
    """
    files = tuple(expand(source))
    return ResolvedSource(source.path, source.weight, files, _format(source, files))


def all_rows(files: tuple[SourceFile, ...]) -> Iterator[tuple[str, Row | BadRow]]:
    """(file:line, row) of a source's rows, read as far as they are asked for."""
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
    rows = list(islice(all_rows(files), _ROWS_LOOKED_AT))
    good = [(place, row) for place, row in rows if not isinstance(row, BadRow)]
    if good:
        return detect_format(good)
    for place, row in rows:
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}; none of the first rows can be read")
    raise InputError(f"{files[0].uri}: there are no rows; expected at least one")
