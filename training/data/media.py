"""Refuses rows with images, videos or sounds: only text is trained."""

from collections.abc import Iterator
from typing import Any

from .rows import Row
from .shapes import RowError

_KINDS = ("image", "video", "audio")
_COLUMNS = frozenset(
    {kind for name in _KINDS for kind in (name, f"{name}s", f"{name}_url")}
    | {"pixel_values", "pixel_values_videos", "input_features"}
)
"""Columns of rows, and keys of a message or of a part of it."""
_PARTS = frozenset(kind for name in _KINDS for kind in (name, f"{name}_url", f"input_{name}"))
"""Types of the parts of a message's content."""


def refuse_media(row: Row) -> None:
    """Refuse a row that holds more than text.

    Raises:
        RowError: naming the column, or the message and its part.
    """
    for place, kind in _media(row):
        raise RowError(
            f"{place} holds {kind}, and only text is trained; remove it (and what the text says "
            "of it), or leave the row out"
        )


def _media(row: Row) -> Iterator[tuple[str, str]]:
    """The place and the kind of each image, video or sound."""
    yield from _columns(row, "")
    for name, value in row.items():
        for index, message in _objects(value):
            place = f"{name}[{index}]"
            yield from _columns(message, f"{place}.")
            for key in ("content", "value"):
                for number, part in _objects(message.get(key)):
                    where = f"{place}.{key}[{number}]"
                    if isinstance(part.get("type"), str) and part["type"] in _PARTS:
                        yield where, f"a part of type {part['type']}"
                    yield from _columns(part, f"{where}.")


def _columns(values: Row, prefix: str) -> Iterator[tuple[str, str]]:
    """A column without a value, as a table has it in rows of text, holds nothing."""
    for name in values.keys() & _COLUMNS:
        if values[name] not in (None, "", [], {}):
            yield prefix + name, "other data than text"


def _objects(value: Any) -> Iterator[tuple[int, Row]]:
    """The objects in a list, with their index."""
    if isinstance(value, list):
        yield from ((index, item) for index, item in enumerate(value) if isinstance(item, dict))
