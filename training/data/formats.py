"""Row formats of training data, and their conversion to the shapes that finray uses."""

from collections.abc import Callable, Sequence
from typing import Literal

from ..common.errors import InputError
from .fields import (
    alpaca_prompt,
    answered,
    conversation_of,
    required_text,
    sharegpt_turns,
    turns_of,
)
from .preference_formats import from_labelled, from_preference
from .reading import Row
from .shapes import Completion, Example, Question, Text

KnownFormat = Literal[
    "preference",
    "labelled",
    "messages",
    "alpaca",
    "sharegpt",
    "prompt_completion",
    "prompt",
    "text",
]
EXPECTED_FIELDS: dict[KnownFormat, str] = {
    "preference": "chosen and rejected, whole or after a prompt, conversations or instruction",
    "labelled": "label (or kto_tag), with messages, conversations or a prompt and its answer",
    "messages": "messages: a list of {role, content}",
    "sharegpt": "conversations: a list of {from, value} or {role, content}",
    "alpaca": "instruction and output (optionally input, system, history)",
    "prompt_completion": "prompt, and completion or response",
    "prompt": "prompt only",
    "text": "text or content",
}
_KEYS: dict[KnownFormat, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "labelled": tuple(
        (*keys, label)
        for label in ("label", "kto_tag")
        for keys in (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("messages",),
            ("conversations",),
            ("instruction", "output"),
        )
    ),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "prompt": (("prompt",),),
    "text": (("text",), ("content",)),
}


def detect_format(rows: Sequence[tuple[str, Row]]) -> KnownFormat:
    """The first format that at least half of the rows fit, else the format that most rows fit.

    Args:
        rows: (file:line, row) pairs, at least one.

    Raises:
        InputError: no row fits any format.
    """
    fits = {
        name: sum(_has_keys(row, alternatives) for _, row in rows)
        for name, alternatives in _KEYS.items()
    }
    common = [name for name, count in fits.items() if 2 * count >= len(rows)]
    best = common[0] if common else max(fits, key=lambda name: fits[name])
    if fits[best] == 0:
        place, row = rows[0]
        keys = ", ".join(map(str, row)) or "none"
        formats = "\n".join(f"  {name}: {keys}" for name, keys in EXPECTED_FIELDS.items())
        raise InputError(
            f"{place}: no row format has these keys: {keys}; the formats are:\n{formats}"
        )
    return best


def normalise(row: Row, row_format: KnownFormat) -> Example:
    """Convert a row of a format to one of the shapes.

    Raises:
        RowError: a key is missing, a value is null, empty or of a wrong type, a role is unknown,
            there is no assistant turn, two answers are the same or answer different prompts, or
            a label is neither true nor false.
    """
    return _NORMALISERS[row_format](row)


def _has_keys(row: Row, alternatives: tuple[tuple[str, ...], ...]) -> bool:
    return any(all(key in row for key in keys) for keys in alternatives)


def _from_messages(row: Row) -> Example:
    return conversation_of(turns_of(row.get("messages"), "messages"))


def _from_sharegpt(row: Row) -> Example:
    return conversation_of(sharegpt_turns(row))


def _from_alpaca(row: Row) -> Example:
    return conversation_of(answered(alpaca_prompt(row), required_text(row, "output")))


def _from_prompt_completion(row: Row) -> Example:
    name = "completion" if "completion" in row else "response"
    if not isinstance(row.get("prompt"), list):
        return Completion(
            required_text(row, "prompt"), required_text(row, "completion", "response")
        )
    prompt = turns_of(row["prompt"], "prompt")
    return conversation_of(prompt + turns_of(row.get(name), name), first_trained=len(prompt))


def _from_prompt(row: Row) -> Example:
    if not isinstance(row.get("prompt"), list):
        return Question(required_text(row, "prompt"))
    return Question(tuple(turns_of(row["prompt"], "prompt")))


def _from_text(row: Row) -> Example:
    return Text(required_text(row, "text", "content"))


_NORMALISERS: dict[KnownFormat, Callable[[Row], Example]] = {
    "preference": from_preference,
    "labelled": from_labelled,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "prompt": _from_prompt,
    "text": _from_text,
}
