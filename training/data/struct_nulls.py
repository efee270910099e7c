"""Removes what Arrow adds to messages and tools: a column's structs all have the same keys, with
null where a row has none, but a chat template asks whether a key is there."""

from typing import Any

import pyarrow as pa

from .rows import Unreadable

_CHAT_KEYS = {"role", "from", "tool_calls", "function", "parameters", "arguments"}
"""Keys by which messages and tools are known, whatever the name of their column."""
_TOOLS = ("tools", "functions", "chat_template_kwargs")


def chat_columns(schema: Any) -> tuple[str, ...]:
    """The columns of an Arrow schema that hold messages or tools as structs."""
    return tuple(field.name for field in schema if _is_chat(field))


def _is_chat(field: Any) -> bool:
    if field.name in _TOOLS:
        return not pa.types.is_string(field.type)
    kind = field.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and any(
        child.name in _CHAT_KEYS or _is_chat(child) for child in kind
    )


def without_nulls(value: Any) -> Any:
    """A value as JSON has it: without the keys of its objects that are null, at all depths, with
    maps as objects, and dates as text."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):  # a map
        value = dict(value)
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    is_json = isinstance(value, str | int | float | Unreadable) or value is None
    return value if is_json else str(value)
