"""Reads the fields of a row: texts, numbers and prompts. A RowError says why a field is refused."""

import json
from typing import Any

from .rows import Row, Unreadable, shown
from .scalars import number_in
from .shapes import ChatContext, Conversation, Message, Question, RowError
from .tool_fields import check_calls, names_tools, tools_of

_NO_OPTIONS = frozenset({"messages", "tools", "add_generation_prompt"})
_LARGEST = 1e30
"""Of float32's size; NaN is not below it either."""


def text_of(value: Any, name: str) -> str:
    """Check that a value is text and not blank; `name` is the field's name in errors."""
    if value is None:
        raise RowError(f"{name} is null; expected text")
    if isinstance(value, Unreadable):
        raise RowError(f"{name} cannot be read: {value.reason}")
    if not isinstance(value, str):
        raise RowError(f"{name} is of type {type(value).__name__}; expected text")
    if not value.strip():
        raise RowError(f"{name} is empty; expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            f"{name} contains an unpaired surrogate, which is not a valid character"
        ) from None
    return value


def required_text(row: Row, *names: str) -> str:
    """The text of the first of these fields that the row has."""
    for name in names:
        if name in row:
            return text_of(row[name], name)
    raise RowError(f"{' or '.join(names)} is missing")


def optional_text(row: Row, name: str) -> str:
    """The text of a field; empty if the field is missing, null or empty."""
    value = row.get(name)
    return "" if value is None or value == "" else text_of(value, name)


def number_of(row: Row, name: str) -> float:
    """The finite number in a field."""
    if name not in row:
        raise RowError(f"{name} is missing; expected a number")
    value = number_in(row[name])
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < _LARGEST:
        raise RowError(f"{name} is {shown(value)}; expected a number")
    return float(value)


def conversation_of(row: Row, messages: list[Message], first_trained: int = 0) -> Conversation:
    """A conversation; refused if it has no assistant turn to learn from.

    Args:
        row: its row, which may hold a system prompt, tools and settings for the chat template.
        messages: all its messages.
        first_trained: index of the first message that may be trained.
    """
    if not any(message["role"] == "assistant" for message in messages[first_trained:]):
        raise RowError("there is no assistant turn to learn from")
    check_calls(messages, "messages")
    begun = _with_system(row, messages)
    first_trained += len(begun) - len(messages) if first_trained else 0
    silent = frozenset(n for n, message in enumerate(begun) if message.get("weight") == 0)
    return Conversation(tuple(map(_unweighted, begun)), first_trained, context_of(row), silent)


def chat_question(row: Row, prompt: list[Message]) -> Question:
    """A prompt of messages; system prompt, tools and settings are those of its row."""
    check_calls(prompt, "prompt")
    begun = _with_system(row, prompt)
    return Question(tuple(map(_unweighted, begun)), context=context_of(row))


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the system prompt of the row's column, unless they begin with one."""
    system = _system_of(row)
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def is_for_chat(row: Row) -> bool:
    """True if the row has what only a chat template can render: a system prompt, or tools."""
    return bool(_system_of(row)) or names_tools(row)


def _system_of(row: Row) -> str:
    """The row's system prompt; empty without one. A column of this name may hold other data."""
    value = row.get("system")
    return text_of(value, "system") if isinstance(value, str) and value.strip() else ""


def _unweighted(message: Message) -> Message:
    if "weight" not in message:
        return message
    return {key: value for key, value in message.items() if key != "weight"}


def context_of(row: Row) -> ChatContext:
    """The tools of a row, and its settings for the chat template."""
    options = row.get("chat_template_kwargs")
    if isinstance(options, str) and options.strip():
        try:
            options = json.loads(options)
        except ValueError as error:
            raise RowError(f"chat_template_kwargs is not valid JSON: {error}") from None
    if options is not None and not isinstance(options, dict):
        raise RowError(f"chat_template_kwargs is {shown(options)}; expected an object")
    for name in _NO_OPTIONS.intersection(options or {}):
        raise RowError(f"chat_template_kwargs sets {name}, which the row has of its own; remove it")
    return ChatContext(tools_of(row), options or {})


def answered(prompt: list[Message], answer: str) -> list[Message]:
    """The prompt followed by an assistant turn."""
    return [*prompt, {"role": "assistant", "content": answer}]


def alpaca_prompt(row: Row) -> list[Message]:
    """The prompt of an Alpaca row: its history, then the instruction with its input."""
    instruction = required_text(row, "instruction")
    more = optional_text(row, "input")
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"history is {type(history).__name__}; expected a list of pairs")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}] is not a pair of a question and an answer")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text_of(text, f"history[{index}]")})
    question = f"{instruction}\n\n{more}" if more else instruction
    return [*messages, {"role": "user", "content": question}]
