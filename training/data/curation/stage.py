"""What a stage that looks at one row after the other is given, and what it answers."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ...common.storage import Folder
from ...config.source import KnownFormat
from ..formats import read_examples
from ..render_settings import RenderSettings
from ..rows import Row
from ..shapes import Conversation, Example, LabelledExample, RowError, parts_of
from .texts import compared_texts


@dataclass(frozen=True)
class Reading:
    """How the method reads the rows of a source."""

    format: KnownFormat
    method: str
    """The method's kind."""
    columns: tuple[str, ...]
    """The `columns` of the method's settings."""


@dataclass(frozen=True)
class Item:
    """A row on its way through the stages."""

    index: int
    """Its number in its chunk, counted from 0 with all rows that are read."""
    line: int
    """Its line in its chunk, counted from 1."""
    row: Row
    example: Example
    """What the method reads in the row."""
    extra: str
    """Further input of the method, as JSON."""
    group: str | None
    """The value of data.holdout.group_by, as JSON, before any stage changed it."""

    @classmethod
    def read(cls, index: int, line: int, row: Row, reading: Reading, group: str | None) -> "Item":
        """Read a row.

        Raises:
            RowError: the method cannot use it.
        """
        example, extra = _read(row, reading)
        return cls(index, line, row, example, extra, group)

    def with_row(self, row: Row, reading: Reading) -> "Item":
        """The item with a changed row.

        Raises:
            RowError: the method cannot use it.
        """
        example, extra = _read(row, reading)
        return replace(self, row=row, example=example, extra=extra)

    def as_json(self, reading: Reading) -> "Item":
        """The item with the row as a stage's file holds it: values that JSON lacks are text.

        Raises:
            RowError: JSON cannot hold it.
        """
        try:
            row = json.loads(json.dumps(self.row, default=str))
        except (RecursionError, ValueError, TypeError) as error:
            raise RowError(f"not usable as JSON: {error}") from None
        return self.with_row(row, reading)

    @cached_property
    def texts(self) -> list[str]:
        """The texts of the row that are compared."""
        return compared_texts(self.example)

    @property
    def size(self) -> int:
        """Characters of these texts."""
        return sum(map(len, self.texts))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes of all that is learnt from the row: those of equal rows are equal."""
        label = repr(self.example.label) if isinstance(self.example, LabelledExample) else ""
        parts = [*self.example.contents, label, repr(_trained(self.example)), self.extra]
        content = "\0".join([*parts, *(str(len(part)) for part in parts)])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _read(row: Row, reading: Reading) -> tuple[Example, str]:
    example, pairs = read_examples(row, reading.format, reading.method, reading.columns)
    extras = [extra for _, extra in pairs if extra is not None]
    return example, json.dumps(extras, sort_keys=True, default=str) if extras else ""


def _trained(example: Example) -> list[tuple[int, list[int]]]:
    """Of each conversation, from which message on it is trained, and which ones are not."""
    conversations = [part for part in parts_of(example) if isinstance(part, Conversation)]
    return [(each.first_trained, sorted(each.silent)) for each in conversations]


@dataclass(frozen=True)
class Outcome:
    """What becomes of a row; with neither of these, it stays as it is."""

    row: Row | None = None
    """The changed row."""
    dropped: str | None = None
    """Why it is dropped, in a few words that many rows share."""
    bad: str | None = None
    """Why it cannot be used."""
    language: str | None = None
    """Code of its language, where the stage looks for that."""


KEPT = Outcome()

Apply = Callable[[Sequence[Item]], list[Outcome]]
"""A stage at work: the outcomes of some rows, in their order."""


@dataclass(frozen=True)
class StageContext:
    """What stages need beside their settings."""

    render: RenderSettings
    folder: Folder
    """The stage's own folder."""
