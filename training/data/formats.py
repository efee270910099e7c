"""Row formats of training data, and their conversion to the shapes that finray uses."""

from collections.abc import Callable, Sequence

from ..common.errors import InputError
from ..common.formatting import one_line
from ..config.methods import METHODS
from ..config.source import KnownFormat
from .examples import examples_of, rules_of, suits
from .fields import (
    alpaca_prompt,
    answered,
    chat_question,
    conversation_of,
    required_text,
)
from .media import refuse_media
from .messages import turns_of, with_lists
from .preference_formats import answer_to, from_labelled, from_preference, is_rated, prompt_of
from .rows import Row
from .shapes import (
    Completion,
    Conversation,
    Example,
    LabelledExample,
    PreferencePair,
    Question,
    RowError,
    Text,
)

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
    "preference": (("chosen", "rejected"), ("chosen_messages", "rejected_messages")),
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
_SHAPES: dict[KnownFormat, type[Example]] = {
    "preference": PreferencePair,
    "labelled": LabelledExample,
    "messages": Conversation,
    "sharegpt": Conversation,
    "alpaca": Conversation,
    "prompt_completion": Completion,
    "prompt": Question,
    "text": Text,
}
_SHOWN = 500
_REMEDY = "rename yours with columns of the source, or convert the rows with its map"


def detect_format(
    rows: Sequence[tuple[str, Row]], method: str | None = None, remedy: str = _REMEDY
) -> KnownFormat:
    """The first format that at least half of the rows fit, else the format that most rows fit.

    Formats that the method learns from come first: a conversation with a topic as its label is a
    conversation. But an answer that is labelled good or bad is no example to imitate.

    Args:
        rows: (file:line, row) pairs, at least one.
        method: the method's kind; None if no format comes first.
        remedy: what to do about rows that fit none; by default for a recipe's source.

    Raises:
        InputError: no row fits any format.
    """
    rated = sum(_has_keys(row, _KEYS["labelled"], _has_value) and is_rated(row) for _, row in rows)
    imitates = method is not None and METHODS[method].learns_from == "documents"
    if imitates and 2 * rated >= len(rows):
        return "labelled"
    for is_present in (_has_value, _has_key):
        fits = {
            name: sum(_has_keys(row, alternatives, is_present) for _, row in rows)
            for name, alternatives in _KEYS.items()
        }
        suitable = {name: n for name, n in fits.items() if method and suits(_SHAPES[name], method)}
        for counts in (suitable, fits):
            common = [name for name, count in counts.items() if 2 * count >= len(rows)]
            if common:
                return common[0]
        for counts in (suitable, fits):
            best = max(counts, key=lambda name: counts[name], default=None)
            if best is not None and counts[best]:
                return best
    place, row = rows[0]
    keys = ", ".join(map(str, row)) or "none"
    keys = one_line(keys if len(keys) <= _SHOWN else f"{keys[:_SHOWN]}…")
    formats = "\n".join(f"  {name}: {fields}" for name, fields in EXPECTED_FIELDS.items())
    raise InputError(
        f"{place}: no row format has these keys: {keys}; the formats are:\n{formats}\n{remedy}"
    )


def normalise(row: Row, row_format: KnownFormat) -> Example:
    """Convert a row of a format to one of the shapes.

    Raises:
        RowError: a key is missing, a value is null, empty or of a wrong type, a role is unknown,
            there is no assistant turn, two answers are the same or answer different prompts, or
            a label is neither true nor false.
    """
    return _NORMALISERS[row_format](with_lists(row))


def read_examples(
    row: Row, row_format: KnownFormat, method: str, columns: Sequence[str]
) -> tuple[Example, list[tuple[Example, Row | None]]]:
    """Read what a method learns from in a row.

    A file may mix formats: a row that has nothing of the source's format is read in its own.

    Args:
        row: the row.
        row_format: the format of its source.
        method: the method's kind.
        columns: the `columns` of the method's settings.

    Returns:
        The row in its own shape, and its examples: each in the shape that the method tokenises,
        with the JSON object to store with it.

    Raises:
        RowError: the row is not usable; see `refuse_media`, `normalise` and `examples_of`.
    """
    rules = rules_of(method)
    refuse_media(row)
    try:
        normalised = normalise(row, own_format(row, row_format, method))
        if isinstance(normalised, Question) and not suits(Question, method):
            refuse_steps(row)
        examples = examples_of(normalised, method)
        return normalised, [
            (rules.adapt(example), rules.extra(row, example, columns)) for example in examples
        ]
    except RecursionError:
        raise RowError("nested too deeply") from None


def refuse_steps(row: Row) -> None:
    """Say of TRL's stepwise supervision more than that the row has no answer.

    Raises:
        RowError: the row has steps.
    """
    if isinstance(row.get("completions"), list):
        raise RowError(
            "completions holds several steps or answers, and no method learns from rows of these; "
            "let map of the source join the steps to one completion, or make a row of each answer"
        )


def own_format(row: Row, row_format: KnownFormat, method: str) -> KnownFormat:
    """The format of a source, or another that the method learns from if the row fits only that."""
    if any(_has_value(row, key) for keys in _KEYS[row_format] for key in keys):
        return row_format
    fitting = [
        name
        for name, alternatives in _KEYS.items()
        if _has_keys(row, alternatives, _has_value) and suits(_SHAPES[name], method)
    ]
    return fitting[0] if fitting else row_format


def _has_keys(
    row: Row, alternatives: tuple[tuple[str, ...], ...], is_present: Callable[[Row, str], bool]
) -> bool:
    return any(all(is_present(row, key) for key in keys) for keys in alternatives)


def _has_value(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _has_key(row: Row, key: str) -> bool:
    return key in row


def _from_messages(row: Row) -> Example:
    return conversation_of(row, turns_of(row.get("messages"), "messages"))


def _from_sharegpt(row: Row) -> Example:
    return conversation_of(row, turns_of(row.get("conversations"), "conversations"))


def _from_alpaca(row: Row) -> Example:
    return conversation_of(row, answered(alpaca_prompt(row), required_text(row, "output")))


def _from_prompt_completion(row: Row) -> Example:
    name = "completion" if "completion" in row else "response"
    prompt = prompt_of(row) or required_text(row, "prompt")
    answer = row.get(name)
    if answer is None:
        answer = required_text(row, "completion", "response")
    return answer_to(row, prompt, answer, name)


def _from_prompt(row: Row) -> Example:
    prompt = prompt_of(row)
    if isinstance(prompt, list):
        return chat_question(row, prompt)
    return Question(required_text(row, "prompt"))


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
