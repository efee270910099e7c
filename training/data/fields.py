"""Reads the fields of a row: texts, turns and prompts. A RowError says why a field is refused."""

from typing import Any

from .reading import Row
from .shapes import Conversation, Message, RowError

_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}


def text_of(value: Any, name: str) -> str:
    """Check that a value is text and not blank; `name` is the field's name in errors."""
    if value is None:
        raise RowError(f"{name} is null; expected text")
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


def turns_of(value: Any, name: str) -> list[Message]:
    """Read a list of messages; each is {role, content} or {from, value}."""
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise RowError(f"{name} is {kind}; expected a list of messages")
    if not value:
        raise RowError(f"{name} is an empty list; expected messages")
    return [turn_of(item, f"{name}[{index}]") for index, item in enumerate(value)]


def turn_of(item: Any, name: str) -> Message:
    """Read a message, {role, content} or {from, value}; the role becomes a standard one."""
    if not isinstance(item, dict):
        raise RowError(f"{name} is of type {type(item).__name__}; expected {{role, content}}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = item.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"{name}.{role_key} is {role!r}; expected system, user, assistant or tool")
    if content_key not in item:
        raise RowError(f"{name}.{content_key} is missing")
    return {"role": _ROLES[role], "content": text_of(item[content_key], f"{name}.{content_key}")}


def conversation_of(messages: list[Message], first_trained: int = 0) -> Conversation:
    """A conversation; refused if it has no assistant turn to learn from."""
    if not any(message["role"] == "assistant" for message in messages[first_trained:]):
        raise RowError("there is no assistant turn to learn from")
    return Conversation(tuple(messages), first_trained)


def answered(prompt: list[Message], answer: str) -> list[Message]:
    """The prompt followed by an assistant turn."""
    return [*prompt, {"role": "assistant", "content": answer}]


def sharegpt_turns(row: Row) -> list[Message]:
    """The messages of a ShareGPT row, with the system prompt of its `system` field, if any."""
    messages = turns_of(row.get("conversations"), "conversations")
    system = optional_text(row, "system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def alpaca_prompt(row: Row) -> list[Message]:
    """The prompt of an Alpaca row: system prompt, history, then the instruction with its input."""
    instruction = required_text(row, "instruction")
    system, more = optional_text(row, "system"), optional_text(row, "input")
    messages = [{"role": "system", "content": system}] if system else []
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
