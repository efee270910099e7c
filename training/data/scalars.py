"""Labels and numbers as files have them: CSV has only text, and data frames turn 1 into 1.0."""

from typing import Any

from .rows import Row

_LABELS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_ANSWERS = ("output", "completion", "response", "chosen", "rejected")
"""Columns whose values are texts to learn from, and in a table of sums often numbers."""


def label_of(value: Any) -> bool | None:
    """The label that a value means: true or false, 1 or 0 (also as 1.0), yes or no, in any case.

    None for any other value.
    """
    if isinstance(value, float | int):
        return bool(value) if value in (0, 1) else None
    if not isinstance(value, str):
        return None
    text = value.strip().lower()
    return _LABELS.get(text[:-2] if text in ("1.0", "0.0") else text)


def number_in(value: Any) -> Any:
    """The number that a text means; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def with_text_answers(row: Row) -> Row:
    """The row with the numbers among its answers as text: 4 for 4 and for 4.0."""
    numbers = {
        name: _as_text(value)
        for name in _ANSWERS
        if isinstance(value := row.get(name), int | float) and not isinstance(value, bool)
    }
    return {**row, **numbers} if numbers else row


def _as_text(number: float) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)
