"""A recipe's sources, resolved: their files, and the format of their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import InputError
from ..recipe import Source
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


def resolve_source(source: Source) -> ResolvedSource:
    """Find a source's files and detect its format.

    Raises:
        InputError: for missing, empty or damaged files, and where none of the first rows is
            readable or fits a format.
    """
    files = tuple(expand(source))
    return ResolvedSource(source.path, source.weight, files, _format(source, files))


def first_rows(files: tuple[SourceFile, ...], count: int) -> Iterator[tuple[str, Row | BadRow]]:
    """(file:line, row) of the first rows of a source."""
    return islice(_all_rows(files), count)


def _all_rows(files: tuple[SourceFile, ...]) -> Iterator[tuple[str, Row | BadRow]]:
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
    rows = list(first_rows(files, _ROWS_LOOKED_AT))
    good = [(place, row) for place, row in rows if not isinstance(row, BadRow)]
    if good:
        return detect_format(good)
    for place, row in rows:
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}; none of the first rows can be read")
    raise InputError(f"{files[0].uri}: there are no rows; expected at least one")
