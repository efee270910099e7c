"""The texts of a row: those that stages compare, and those that they rewrite."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..messages import is_data, with_lists
from ..rows import Row
from ..shapes import Completion, Conversation, Example, Message, Question, RowError, parts_of

_NAMES = frozenset({"role", "from", "id", "tool_call_id", "name", "type", "call_id"})
"""Keys whose values are names, not texts."""
_ARGUMENTS = frozenset({"arguments", "parameters", "args", "input"})
"""Keys of a call's arguments, in which any key's value is a text."""
_CONTENTS = frozenset({"content", "value"})
"""Keys of a message's content, which becomes JSON with all that it holds where it is data."""
_CONTAINER = re.compile(r"\s*[\[{]")
_SCALAR = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*')
"""A string or a number of JSON."""
_decode = json.JSONDecoder(strict=False).decode
_CONTEXT = frozenset({"system", "developer"})
"""Roles whose messages many rows share."""


def compared_texts(example: Example) -> list[str]:
    """What a row says, without system prompts and tools, which many rows share."""
    texts: list[str] = []
    for part in parts_of(example):
        if isinstance(part, Conversation):
            texts += _of_messages(part.messages)
        elif isinstance(part, Completion):
            texts += [part.prompt, part.completion]
        elif isinstance(part, Question):
            of_prompt = isinstance(part.prompt, str)
            texts += [part.prompt] if of_prompt else _of_messages(part.prompt)  # type: ignore[list-item,arg-type]
            texts += [part.reference] if part.reference is not None else []
        else:
            texts.append(part.text)
    return texts


def _of_messages(messages: tuple[Message, ...]) -> list[str]:
    texts = []
    for message in messages:
        if message["role"] in _CONTEXT:
            continue
        texts += [text for key in ("reasoning_content", "content") if (text := message.get(key))]
        for call in message.get("tool_calls", ()):
            texts += strings_of(call["function"])
    return texts


def strings_of(value: Any, in_arguments: bool = False) -> list[str]:
    """All texts in a value of JSON, but for names and system prompts.

    Args:
        value: the value.
        in_arguments: whether it stands in the arguments of a call, where all are texts.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [
            text
            for key, item in value.items()
            if in_arguments or (key not in _NAMES and key not in _CONTEXT)
            for text in strings_of(item, in_arguments or key in _ARGUMENTS)
        ]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings_of(item, in_arguments)]
    return []


def rewritten(row: Row, change: Callable[[str], str], *, whole: bool = False) -> Row:
    """The row with each of its texts changed; the same object if none is.

    In the arguments of calls, and in contents that are no text, keys and every value count, numbers
    too. A text that is JSON of an object or a list stays so: each string and number in it is
    changed on its own.

    Args:
        row: the row.
        change: what is done with a text.
        whole: change names, keys and numbers everywhere, too.

    Raises:
        RowError: it is nested too deeply.
    """
    lists = with_lists(row)  # conversations that are text, in Python's notation perhaps
    try:
        changed = _rewritten(lists, change, whole)
    except RecursionError:
        raise RowError("nested too deeply") from None
    assert isinstance(changed, dict)
    return row if changed is lists else changed


def _rewritten(value: Any, change: Callable[[str], str], in_arguments: bool) -> Any:
    if isinstance(value, str):
        return _rewritten_text(value, change)
    if isinstance(value, Mapping):
        items: dict[Any, Any] = {}
        for key, item in value.items():
            is_name = key in _NAMES and not in_arguments
            all_count = in_arguments or key in _ARGUMENTS or (key in _CONTENTS and is_data(item))
            items[_key(key, change, items) if in_arguments else key] = (
                item if is_name else _rewritten(item, change, all_count)
            )
        is_same = all(
            new is old and own == key
            for (own, new), (key, old) in zip(items.items(), value.items(), strict=True)
        )
        return value if is_same else items
    if isinstance(value, list | tuple):
        parts = [_rewritten(item, change, in_arguments) for item in value]
        return (
            parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
        )
    if in_arguments and isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        return value if (changed := change(text)) == text else changed
    return value


def _key(key: Any, change: Callable[[str], str], taken: Mapping[Any, Any]) -> Any:
    """A changed key of a call's arguments; none takes the place of another."""
    key = change(key) if isinstance(key, str) else key
    start = key
    while key in taken:
        key = f"{start}_{len(taken)}" if key == start else f"{key}_"
    return key


def _rewritten_text(text: str, change: Callable[[str], str]) -> str:
    """The text changed; the same object if nothing is."""
    if "\\" not in text and (changed := change(text)) == text:
        return text  # nor does any value in it change, which stands in it as it is
    if not _is_json(text):
        return change(text)

    def of_scalar(match: re.Match[str]) -> str:
        written = match[0]
        if written[0] != '"':
            return written if (number := change(written)) == written else json.dumps(number)
        value = _string(written)
        changed = _rewritten_text(value, change)
        return written if changed == value else json.dumps(changed, ensure_ascii=value.isascii())

    changed = _SCALAR.sub(of_scalar, text)
    return text if changed == text else changed


def _string(written: str) -> str:
    """The value of a string of JSON."""
    value: str = _decode(written) if "\\" in written else written[1:-1]
    return value


def _is_json(text: str) -> bool:
    """True if a text is JSON of an object or a list."""
    if not _CONTAINER.match(text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
