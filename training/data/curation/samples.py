"""Rows that the funnel shows of what a stage took."""

from typing import Any

from ..rows import Row, excerpt
from ..shapes import RowError
from .redact import ALL_KINDS, mask
from .texts import rewritten


def sample_of(line: int, reason: str, row: Row | None) -> dict[str, Any]:
    """A row as a stage's file holds it: also masked, as recipes show it that redact rows.

    Args:
        line: its line in its chunk.
        reason: why it is dropped.
        row: the row, perhaps before a stage that redacts it; None: it is shown nowhere.
    """
    text, masked = ("", "") if row is None else (excerpt(row), _masked(row))
    return {"line": line, "reason": reason, "text": text, "masked": masked}


def shown_sample(sample: dict[str, Any], place: str, is_redacted: bool) -> dict[str, Any]:
    """A row as the funnel shows it.

    Args:
        sample: the row as a stage's file holds it.
        place: file:line.
        is_redacted: whether a stage of the recipe redacts rows, be it a later one.
    """
    text = sample["masked" if is_redacted else "text"]
    return {"place": place, "reason": sample["reason"], "text": text}


def without_personal_data(text: str) -> str:
    """A text with marks in the place of all kinds of personal data."""
    for kind in ALL_KINDS:
        text = mask(text, kind)
    return text


def _masked(row: Row) -> str:
    """The row without personal data, wherever it stands: a column of names is shown, too."""
    try:
        return excerpt(rewritten(row, without_personal_data, whole=True))
    except RowError:
        return ""
