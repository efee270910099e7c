"""Reads the tools beside a conversation, and the calls of its assistant turns."""

import json
import re
from typing import Any

from .rows import Row, Unreadable, shown
from .shapes import RowError

Call = dict[str, Any]
"""{type: function, function: {name, arguments: an object}}, with the call's id if it has one."""

_OBJECT = re.compile(r"\s*\[?\s*\{")
"""How JSON of an object begins, or of a list of some."""
_ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Keys of a call's arguments: OpenAI's, those of Llama, of LangChain and of Anthropic."""
_CALL_KEYS = {*_ARGUMENTS, "name", "id", "type", "index"}


def tools_of(row: Row) -> tuple[Row, ...]:
    """The tools of a row, each as {type: function, function: {name, …}}.

    Raises:
        RowError: they are not a list of tools, or JSON of one.
    """
    name, value = "tools", row.get("tools")
    if not value and _are_functions(row.get("functions")):
        name, value = "functions", row["functions"]
    value = _parsed(value, name)
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    tools: list[Row] = []
    for index, item in enumerate(items):
        tool = _tool(item, f"{name}[{index}]")
        if tool not in tools:  # a row may list the same tool twice
            tools.append(tool)
    names = [tool["function"]["name"] for tool in tools if "function" in tool]
    for twice in (name for index, name in enumerate(names) if name in names[:index]):
        raise RowError(f"{name} has two different tools of the name {twice!r}; rename one")
    return tuple(tools)


def names_tools(row: Row) -> bool:
    """True if the row seems to have tools; a column of this name may hold other data."""
    value = row.get("tools")
    items = value if isinstance(value, list) else [value]
    are_tools = any(
        isinstance(item, dict) or (isinstance(item, str) and _OBJECT.match(item)) for item in items
    )
    return are_tools or _are_functions(row.get("functions"))


def _are_functions(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value)
    )


def _tool(item: Any, name: str) -> Row:
    item = _parsed(item, name)
    if not isinstance(item, dict):
        raise RowError(f"{name} is {shown(item)}; expected an object with the tool's name")
    if "function" not in item and item.get("type", "function") != "function":
        return item  # a tool that the template itself must know
    function = _parsed(item.get("function", item), f"{name}.function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{name} has no name; expected {{type: function, function: {{name, …}}}}")
    function = {key: value for key, value in function.items() if value is not None}
    function.pop("type", None) if function is not item.get("function") else None
    if "input_schema" in function:  # Anthropic's name
        function.setdefault("parameters", function.pop("input_schema"))
    if isinstance(function.get("parameters"), str):
        function["parameters"] = _parsed(function["parameters"], f"{name}.parameters")
    return {"type": "function", "function": function}


def calls_of(value: Any, name: str) -> list[Call]:
    """The calls in a list, an object or JSON text.

    Raises:
        RowError: they are not JSON, or have no function's name, or arguments other than an object.
    """
    value = _parsed(value, name)
    if value is None or (isinstance(value, dict) and not any(value.values())):
        return []  # a table has an object of nulls where there is no call
    items = value if isinstance(value, list) else [value]
    return [_call(item, f"{name}[{index}]") for index, item in enumerate(items)]


def call_to(function: str, arguments: Any, name: str) -> Call:
    """A call of a function; `name` is the field of its arguments in errors."""
    return {
        "type": "function",
        "function": {"name": function, "arguments": _arguments(arguments, name)},
    }


def _call(item: Any, name: str) -> Call:
    item = _parsed(item, name)
    if not isinstance(item, dict):
        raise RowError(f"{name} is {shown(item)}; expected {{function: {{name, arguments}}}}")
    function = _parsed(item.get("function"), f"{name}.function")
    function = item if function is None else function
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise RowError(f"{name} has no function name; expected {{function: {{name, arguments}}}}")
    key = next((key for key in _ARGUMENTS if function.get(key) is not None), None)
    others = sorted(key for key in function.keys() - _CALL_KEYS if function[key] is not None)
    if key is None and others:
        raise RowError(f"{name} has no arguments, but {', '.join(others)}; call them arguments")
    arguments = None if key is None else function[key]
    call = call_to(function["name"], arguments, f"{name}.{key or 'arguments'}")
    if item.get("id") not in (None, ""):
        call = {"id": str(item["id"]), **call}
    return call


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _arguments(value: Any, name: str) -> Row:
    if value is None or value in ("", []):
        return {}
    value = _parsed(value, name)
    if not isinstance(value, dict):
        raise RowError(f"{name} is {shown(value)}; expected an object of arguments")
    return value


def _parsed(value: Any, name: str) -> Any:
    """The value of JSON text; other values as they are. None for an empty text."""
    if isinstance(value, Unreadable):
        raise RowError(f"{name} cannot be read: {value.reason}")
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{name} is not valid JSON: {error}; it begins {shown(value)}") from None


def check_calls(messages: list[Row], name: str) -> None:
    """Compare tool results with the calls before them.

    Raises:
        RowError: two calls have one id, or a result has no call.
    """
    ids: set[str] = set()
    open_calls, speaker = 0, None
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = message.get("tool_calls", [])
            _collect_ids(calls, ids, f"{name}[{index}]")
            open_calls, speaker = len(calls), message
        elif message["role"] == "tool":
            _check_result(message, speaker, open_calls, ids, f"{name}[{index}]")
            open_calls -= 1
        else:
            open_calls, speaker = 0, None


def _collect_ids(calls: list[Call], ids: set[str], name: str) -> None:
    for number, call in enumerate(calls):
        call_id = call.get("id")
        if call_id is None:
            continue
        if call_id in ids:
            raise RowError(f"{name}.tool_calls[{number}].id {call_id!r} is that of another call")
        ids.add(call_id)


def _check_result(
    message: Row, speaker: Row | None, open_calls: int, ids: set[str], name: str
) -> None:
    call_id = message.get("tool_call_id")
    if call_id is not None and ids:
        if call_id not in ids:
            raise RowError(f"{name}.tool_call_id {call_id!r} is that of no call before it")
        return
    if speaker is None:
        raise RowError(f"{name} is a tool's result without a call before it")
    if "tool_calls" in speaker and open_calls <= 0:
        raise RowError(f"{name} is one more tool result than there are calls before it")
    if "tool_calls" not in speaker and not _may_call(speaker.get("content") or ""):
        raise RowError(f"{name} is a tool's result, but the turn before it calls no tool")


def _may_call(content: str) -> bool:
    """True if a text may hold a call, in a notation of its own."""
    return any(mark in content for mark in ("{", "[", "<", "(", "Action"))
