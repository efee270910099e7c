"""The formats in which people keep training rows, brought to the shapes that finray knows."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..errors import InputError
from .reading import Row
from .shapes import (
    Answer,
    Completion,
    Conversation,
    Message,
    Normalised,
    Pair,
    Question,
    RowError,
    Text,
)

KnownFormat = Literal[
    "preference", "messages", "alpaca", "sharegpt", "prompt_completion", "prompt", "text"
]
WANTED: dict[KnownFormat, str] = {
    "preference": "prompt, chosen and rejected",
    "messages": "messages: a list of {role, content}",
    "sharegpt": "conversations: a list of {from, value} or {role, content}",
    "alpaca": "instruction and output (optionally input, system, history)",
    "prompt_completion": "prompt, and completion or response",
    "prompt": "prompt alone",
    "text": "text or content",
}
_KEYS: dict[KnownFormat, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"),),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "prompt": (("prompt",),),
    "text": (("text",), ("content",)),
}
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


def detect_format(rows: Sequence[tuple[str, Row]]) -> KnownFormat:
    """The first format that at least half of these rows fit, else the one that most fit.

    Args:
        rows: (file:line, row) pairs, at least one.

    Raises:
        InputError: where no format fits any of them.
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
        wanted = "\n".join(f"  {name}: {keys}" for name, keys in WANTED.items())
        raise InputError(f"{place}: no known row format has these keys: {keys}; known:\n{wanted}")
    return best


def normalise(row: Row, row_format: KnownFormat) -> Normalised:
    """Bring a row of a known format to one of the three shapes.

    Raises:
        RowError: for missing keys, nulls, wrong types, empty contents, unknown roles, and
            conversations without an assistant turn.
    """
    return _NORMALISERS[row_format](row)


def _has_keys(row: Row, alternatives: tuple[tuple[str, ...], ...]) -> bool:
    return any(all(key in row for key in keys) for keys in alternatives)


def _text(value: Any, name: str) -> str:
    if value is None:
        raise RowError(f"{name} is null; expected text")
    if not isinstance(value, str):
        raise RowError(f"{name} is of type {type(value).__name__}; expected text")
    if not value.strip():
        raise RowError(f"{name} is empty; expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


def _required(row: Row, *names: str) -> str:
    """The text under the first of these names that the row has."""
    for name in names:
        if name in row:
            return _text(row[name], name)
    raise RowError(f"{' or '.join(names)} is missing")


def _optional(row: Row, name: str) -> str:
    """The text under a name; empty where it is missing, null or empty."""
    value = row.get(name)
    return "" if value is None or value == "" else _text(value, name)


def _turns(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        found = "null" if value is None else type(value).__name__
        raise RowError(f"{name} is {found}; expected a list of messages")
    if not value:
        raise RowError(f"{name} is an empty list; expected messages")
    return [_turn(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _turn(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{name} is of type {type(item).__name__}; expected {{role, content}}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = item.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(f"{name}.{role_key} is {role!r}; expected system, user, assistant or tool")
    if content_key not in item:
        raise RowError(f"{name}.{content_key} is missing")
    return {"role": _ROLES[role], "content": _text(item[content_key], f"{name}.{content_key}")}


def _conversation(messages: list[Message], first_trained: int = 0) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[first_trained:]):
        raise RowError("there is no assistant turn to learn from")
    return Conversation(tuple(messages), first_trained)


def _from_messages(row: Row) -> Normalised:
    return _conversation(_turns(row.get("messages"), "messages"))


def _from_sharegpt(row: Row) -> Normalised:
    turns = _turns(row.get("conversations"), "conversations")
    system = _optional(row, "system")
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return _conversation(turns)


def _from_alpaca(row: Row) -> Normalised:
    instruction, output = _required(row, "instruction"), _required(row, "output")
    system, more = _optional(row, "system"), _optional(row, "input")
    messages = [{"role": "system", "content": system}] if system else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"history is {type(history).__name__}; expected a list of pairs")
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"history[{index}] is not a pair of a question and an answer")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text(said, f"history[{index}]")})
    question = f"{instruction}\n\n{more}" if more else instruction
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return _conversation(messages)


def _from_prompt_completion(row: Row) -> Normalised:
    name = "completion" if "completion" in row else "response"
    if not isinstance(row.get("prompt"), list):
        return Completion(_required(row, "prompt"), _required(row, "completion", "response"))
    prompt = _turns(row["prompt"], "prompt")
    return _conversation(prompt + _turns(row.get(name), name), first_trained=len(prompt))


def _from_prompt(row: Row) -> Normalised:
    if not isinstance(row.get("prompt"), list):
        return Question(_required(row, "prompt"))
    return Question(tuple(_turns(row["prompt"], "prompt")))


def _from_preference(row: Row) -> Normalised:
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    return Pair(chosen, rejected)


def _answer(row: Row, name: str) -> Answer:
    """The prompt with the answer under a name."""
    if not isinstance(row.get("prompt"), list):
        return Completion(_required(row, "prompt"), _required(row, name))
    prompt = _turns(row["prompt"], "prompt")
    return _conversation(prompt + _turns(row.get(name), name), first_trained=len(prompt))


def _from_text(row: Row) -> Normalised:
    return Text(_required(row, "text", "content"))


_NORMALISERS: dict[KnownFormat, Callable[[Row], Normalised]] = {
    "preference": _from_preference,
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "prompt": _from_prompt,
    "text": _from_text,
}
