"""A row as it is read: a JSON object, or the reason why there is none."""

import json
from dataclasses import dataclass
from typing import Any

SHOWN = 300
"""Characters of a row in messages and in the quarantine."""

_SHOWN_OF_VALUE = 80

Row = dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    reason: str
    raw: str
    """The row as it is in the file, shortened."""


@dataclass(frozen=True)
class Unreadable:
    """A value of Parquet that Python cannot hold, such as a date in the year 12,000."""

    reason: str


def row_or_bad(value: Any, text: str) -> Row | BadRow:
    """A JSON value as a row; `text` is its text in the file."""
    if isinstance(value, dict):
        return value
    return BadRow(f"expected a JSON object, found {type(value).__name__}", shorten(text))


def too_large(size: int, max_bytes: int, start: str) -> BadRow:
    """A row above data.max_row_bytes.

    Args:
        size: its size in bytes.
        max_bytes: the limit.
        start: how its text begins.
    """
    reason = f"the row has {size:,} bytes; data.max_row_bytes allows {max_bytes:,}"
    return BadRow(reason, f"{start[:SHOWN]}…")


def shorten(text: str) -> str:
    """Shorten a row's text to a few hundred characters, for messages and the quarantine."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def size_in_bytes(text: str) -> int:
    """Size of a text in UTF-8; bytes that were not UTF-8 are lone surrogates in it."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def shown(value: Any) -> str:
    """A value in a message: its first characters, on one line."""
    text = repr(value)
    return text if len(text) <= _SHOWN_OF_VALUE else f"{text[:_SHOWN_OF_VALUE]}…"


def excerpt(row: Row) -> str:
    """A row as text for people, shortened; of one that is nested too deeply, only its keys."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=str)
        # UTF-8 has no lone surrogates.
        return shorten(text.encode("utf-8", "backslashreplace").decode("utf-8"))
    except (RecursionError, ValueError, TypeError):
        return ", ".join(map(ascii, row))
