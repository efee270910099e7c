"""Reads messages as people write them: OpenAI's and ShareGPT's keys, parts, reasoning, calls.

A message that is read has the keys that chat templates read: role, content, reasoning_content,
tool_calls, tool_call_id, name, and any further key of the row. Keys that are null are absent.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .fields import text_of
from .harmony import join_channels
from .rows import Row, shown
from .shapes import Message, RowError, essence
from .template_traits import INLINE_THOUGHT
from .tool_fields import calls_of

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
"""The role of each name that is understood; capital letters do not count."""
CONVERSATIONS = (
    *("messages", "conversations", "prompt", "completion", "response"),
    *("chosen", "rejected", "chosen_messages", "rejected_messages"),
)
"""Columns that may hold messages."""
_CALLS = {"function_call", "tool_call"}
"""Names of a turn whose content is JSON of its calls."""
_WEIGHTS = ("weight", "train", "loss", "loss_weight")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = {"text", "input_text", "output_text"}
_REASONING_PARTS = {"reasoning", "thinking"}
_CALL_PARTS = {
    "tool_use": "write it as an entry of the message's tool_calls",
    "tool_result": "write it as a message of the role tool",
}
_TEXT_KEYS = ("text", "value", "content", "reasoning", "thinking")
READ_KEYS = {
    *("role", "from", "content", "value", "function_call", "tool_calls"),
    *_WEIGHTS,
    *_REASONING,
}
"""Keys of a message that are read here; others are left to the chat template."""
_ROLE_KEYS = ("role", "from")
_OPENAI_KEYS = ("role", "content", "value")
_SHAREGPT_KEYS = ("from", "value", "content")
"""The keys of the role and of the content, and another that may stand for the latter."""
_BEGINS_MESSAGES = re.compile(r"\s*\[\s*\{")
_IS_MESSAGES = re.compile(r"\s*\[\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:")


def with_lists(row: Row, role_keys: Sequence[str] = _ROLE_KEYS) -> Row:
    """The row with lists where a column holds messages as text, JSON's or Python's, or as an
    object of columns.

    Args:
        row: the row.
        role_keys: keys of which each message has one.
    """
    lists = {name: _messages_in(row[name], role_keys) for name in CONVERSATIONS if name in row}
    read = {name: value for name, value in lists.items() if value is not None}
    return {**row, **read} if read else row


def _messages_in(value: Any, role_keys: Sequence[str]) -> list[Any] | None:
    """The messages in a text or an object of columns; None for other values."""
    if isinstance(value, dict):
        return _from_columns(value, role_keys)
    if not isinstance(value, str) or not _BEGINS_MESSAGES.match(value):
        return None
    if not any(f"{quote}{key}{quote}" in value for key in role_keys for quote in "\"'"):
        return None
    messages = _parsed(value)
    if messages is None and _IS_MESSAGES.match(value):
        raise RowError(f"{shown(value)} begins as messages, but is not valid JSON of them")
    is_list = isinstance(messages, list) and len(messages) > 0
    return messages if is_list and all(_has_key(item, role_keys) for item in messages) else None


def _parsed(text: str) -> Any:
    """The value of JSON, or of Python's notation, which pandas writes to CSV; None for others."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    if "'role'" not in text and "'from'" not in text:
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _from_columns(value: Row, role_keys: Sequence[str]) -> list[Any] | None:
    """Messages from {role: [...], content: [...]}, as the datasets library writes a sequence."""
    columns = {key: items for key, items in value.items() if isinstance(items, list)}
    lengths = {len(items) for items in columns.values()}
    if len(lengths) != 1 or not columns.keys() & set(role_keys):
        return None
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _has_key(item: Any, keys: Sequence[str]) -> bool:
    return isinstance(item, dict) and any(key in item for key in keys)


def turns_of(value: Any, name: str) -> list[Message]:
    """Read a list of messages; each is {role, content} or {from, value}.

    Raises:
        RowError: it is not such a list.
    """
    if isinstance(value, str) and value.strip():
        raise RowError(f"{name} is {shown(value)}; expected a list of messages, or JSON of one")
    if not isinstance(value, list):
        kind = "null" if value is None else type(value).__name__
        raise RowError(f"{name} is {kind}; expected a list of messages")
    if not value:
        raise RowError(f"{name} is an empty list; expected messages")
    messages = [turn_of(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return _joined(join_channels(messages, name))


def turn_of(item: Any, name: str) -> Message:
    """Read a message; its role becomes a standard one.

    Raises:
        RowError: role, content or calls are not usable.
    """
    if not isinstance(item, dict):
        raise RowError(f"{name} is of type {type(item).__name__}; expected {{role, content}}")
    # A column of Parquet has all keys in all messages, and null where a message lacks one.
    is_sharegpt = item.get("from") is not None and item.get("role") is None
    role_key, content_key, other = _SHAREGPT_KEYS if is_sharegpt else _OPENAI_KEYS
    if item.get(content_key) is None and item.get(other) is not None:
        content_key = other
    written = item.get(role_key)
    role = ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise RowError(
            f"{name}.{role_key} is {shown(written)}; expected system, user, assistant or tool; "
            "rename it, or in a recipe let roles of the source say which it stands for"
        )
    message: Message = {"role": role}
    if str(written).lower() in _CALLS and not item.get("tool_calls"):
        _read_calls(message, item.get(content_key), f"{name}.{content_key}")
    else:
        _read_content(message, item, content_key, name)
    message.update(
        {key: value for key, value in item.items() if key not in READ_KEYS and value is not None}
    )
    if "tool_call_id" in message:  # calls have their ids as text, too
        message["tool_call_id"] = str(message["tool_call_id"])
    if not _counts(item, name):
        message["weight"] = 0
    return message


def _read_calls(message: Message, value: Any, name: str) -> None:
    """The calls that are a turn's whole content, perhaps after a thought."""
    thought = INLINE_THOUGHT.fullmatch(value) if isinstance(value, str) else None
    if thought is not None:
        message["reasoning_content"], value = thought.group(1).strip(), thought.group(2)
    message["content"] = None
    message["tool_calls"] = calls_of(value, name)
    if not message["tool_calls"]:
        raise RowError(f"{name} is empty; expected JSON of a call")


def _read_content(message: Message, item: Row, content_key: str, name: str) -> None:
    """Content, reasoning and calls of a turn."""
    is_answer = message["role"] == "assistant"
    calls = calls_of(item.get("tool_calls"), f"{name}.tool_calls") if is_answer else []
    if is_answer and item.get("function_call") is not None:
        calls += calls_of(item["function_call"], f"{name}.function_call")
    value = item.get(content_key)
    if message["role"] == "tool" and is_data(value):
        value = json.dumps(value, ensure_ascii=False, default=str)
    content, thought = _content_of(value, f"{name}.{content_key}")
    if is_answer:
        thought = _reasoning_of(item, name) or thought
    if content is None or not content.strip():
        content = _empty(message["role"], bool(calls or thought), item, content_key, name)
    message["content"] = content
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls


def is_data(value: Any) -> bool:
    """True if a content is a value that becomes JSON, and neither text nor parts of it."""
    if isinstance(value, dict):
        return value.get("type") not in (*_TEXT_PARTS, *_REASONING_PARTS)
    if isinstance(value, list):
        are_parts = (isinstance(part, str) or _is_part(part) for part in value)
        return not all(are_parts)
    return isinstance(value, bool | int | float)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and ("type" in value or value.keys() == {"text"})


def _reasoning_of(item: Row, name: str) -> str:
    """The first reasoning that a turn has in a field of its own: text, or a list of parts."""
    for key in _REASONING:
        texts = _content_of(item.get(key), f"{name}.{key}")
        if any(text and text.strip() for text in texts):
            return "\n".join(text for text in texts if text)
    return ""


def _empty(role: str, says_more: bool, item: Row, key: str, name: str) -> str | None:
    """The content of a message that has none; refused where something is expected."""
    if role == "assistant" and says_more:
        return None
    if key not in item:
        raise RowError(
            f"{name}.{key} is missing; add it, or in a recipe name its key in message_keys of the "
            "source"
        )
    if role in ("tool", "system") and item.get(key) is not None:
        return ""  # a tool may return nothing; an empty system prompt replaces a template's own
    return text_of(item.get(key) if not isinstance(item.get(key), list) else "", f"{name}.{key}")


def _content_of(value: Any, name: str) -> tuple[str | None, str]:
    """(text, reasoning) of a content: text, a list of parts, or an object, which becomes JSON."""
    if value is None:
        return None, ""
    if isinstance(value, list):
        return _parts_of(value, name)
    if isinstance(value, dict):
        if not is_data(value):
            return _parts_of([value], name)
        return json.dumps(value, ensure_ascii=False, default=str), ""
    return (value if isinstance(value, str) and not value.strip() else text_of(value, name)), ""


def _parts_of(parts: list[Any], name: str) -> tuple[str, str]:
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        kind, text = _part(part, f"{name}[{index}]")
        (thoughts if kind in _REASONING_PARTS else texts).append(text)
    return "".join(texts), "\n".join(thoughts)


def _part(part: Any, name: str) -> tuple[str, str]:
    """(type, text) of a part of a content."""
    if isinstance(part, str):
        return "text", part if not part.strip() else text_of(part, name)
    if not isinstance(part, dict):
        raise RowError(f"{name} is of type {type(part).__name__}; expected {{type: text, text}}")
    kind = part.get("type", "text")
    if not isinstance(kind, str):
        raise RowError(f"{name}.type is {shown(kind)}; expected text")
    if kind not in _TEXT_PARTS | _REASONING_PARTS:
        remedy = _CALL_PARTS.get(kind, "only text can be learnt")
        raise RowError(f"{name} is a part of type {shown(kind)}; {remedy}")
    key = next((key for key in _TEXT_KEYS if part.get(key) is not None), None)
    if key is None:
        raise RowError(f"{name} has no text; expected {{type: text, text: …}}")
    text = part[key]
    if isinstance(text, list) and kind in _REASONING_PARTS:
        return kind, "".join(_parts_of(text, f"{name}.{key}"))
    is_blank = isinstance(text, str) and not text.strip()
    return kind, text if is_blank else text_of(text, f"{name}.{key}")


def _counts(item: Row, name: str) -> bool:
    """False if one of the message's weights is 0."""
    counts = True
    for key in _WEIGHTS:
        value = item.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RowError(f"{name}.{key} is {shown(value)}; expected 0 or 1, true or false")
        counts = counts and bool(value)
    return counts


def _joined(messages: list[Message]) -> list[Message]:
    """Calls that directly follow an assistant turn are part of it."""
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        is_rest = before is not None and before["role"] == "assistant" and _is_only_calls(message)
        if before is None or not is_rest:
            joined.append(message)
            continue
        before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        thoughts = [m["reasoning_content"] for m in (before, message) if "reasoning_content" in m]
        if thoughts:
            before["reasoning_content"] = "\n".join(thoughts)
        if message.get("weight") == 0:
            before["weight"] = 0
    return joined


def _is_only_calls(message: Message) -> bool:
    return message["role"] == "assistant" and message["content"] is None and "tool_calls" in message


def with_roles(row: Row, roles: Mapping[str, str]) -> Row:
    """The row with other names for the roles of its messages, in all columns that hold some.

    Args:
        row: the row.
        roles: a standard role by each of the row's own names.
    """

    def renamed(message: Row) -> Row:
        keys = [key for key in _ROLE_KEYS if isinstance(message.get(key), str)]
        return {**message, **{key: roles.get(message[key], message[key]) for key in keys}}

    return with_messages(row, renamed)


def with_messages(row: Row, change: Callable[[Row], Row]) -> Row:
    """The row with each message of its conversations changed."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, dict) else value

    return {
        name: value
        if name not in CONVERSATIONS
        else [changed(item) for item in value]
        if isinstance(value, list)
        else changed(value)
        for name, value in row.items()
    }


def are_equal(first: Message, second: Message) -> bool:
    """True if two messages say the same; ids and further keys do not count."""
    return essence(first) == essence(second)
