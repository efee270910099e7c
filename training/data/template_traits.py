"""What a chat template reads and renders, as it shows when it renders sentinels."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from .rows import Row
from .shapes import Message, RowError

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_END_OF_THOUGHT = "</think>"
_NAME, _KEY, _VALUE = "sentinel_a8f3", "sentinel_b9d4", "sentinel_c6e7"
_RESULT, _ANSWER, _THOUGHT = "sentinel_d2f1", "sentinel_e5a0", "sentinel_f7c3"
_NOTHING = "None"
"""What a template writes that takes a missing content for text."""
INLINE_THOUGHT = re.compile(r"\s*(?:<think>|(?!.*<think>))(.*?)</think>(.*)", re.DOTALL)
"""A thought and the rest; models whose prompt opens the thought write only its end."""
_USER: Message = {"role": "user", "content": "sentinel_question"}
_CALL: Row = {
    "id": "abcdefghi",  # some templates want exactly nine letters
    "type": "function",
    "function": {"name": _NAME, "arguments": {_KEY: _VALUE}},
}
_CALLING: Message = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
_RESULT_TURN: Message = {
    "role": "tool",
    "name": _NAME,
    "tool_call_id": _CALL["id"],
    "content": _RESULT,
}
_ANSWER_TURN: Message = {"role": "assistant", "content": _ANSWER}
_TOOL: Row = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "sentinel",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "sentinel"}},
            "required": [_KEY],
        },
    },
}

EmptyContent = Literal["null", "text", "absent"]
"""How a turn without content is written: None, an empty text, or no key."""

Render = Callable[[Sequence[Message], Sequence[Row]], str]
"""Renders messages and tools as they are; raises a RowError."""


@dataclass(frozen=True)
class Writing:
    """The form in which a template reads messages."""

    reasoning_keys: tuple[str, ...] = ()
    """The keys of reasoning that the template's source mentions."""
    wraps_reasoning: bool = False
    """Reasoning is part of the content, inside <think> and </think>."""
    content_parts: bool = False
    """Content is a list of parts."""
    empty_content: EmptyContent = "null"
    text_arguments: bool = False
    """A call's arguments are JSON text."""

    def write(self, message: Message) -> Message:
        """A message in this form."""
        written = dict(message)
        content = written.pop("content")
        thought = written.pop("reasoning_content", None)
        inline = INLINE_THOUGHT.fullmatch(content or "") if thought is None else None
        if inline is not None and self.reasoning_keys and message["role"] == "assistant":
            thought, content = inline.group(1).strip(), inline.group(2).strip() or None
        if thought is not None:
            written.update(dict.fromkeys(self.reasoning_keys, thought))
            if self.wraps_reasoning:
                content = f"<think>\n{thought}\n</think>\n\n{content or ''}"
        if content is None and self.empty_content == "text":
            content = ""
        if content is not None and self.content_parts:
            content = [{"type": "text", "text": content}]
        if content is not None or self.empty_content == "null":
            written["content"] = content
        if self.text_arguments and "tool_calls" in written:
            written["tool_calls"] = [_with_text(call) for call in written["tool_calls"]]
        return written


def _with_text(call: Row) -> Row:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False, default=str)
    return {**call, "function": {**function, "arguments": text}}


@dataclass(frozen=True)
class Traits:
    """The form of messages that a template reads, and what of them it renders."""

    writing: Writing
    tools: bool
    calls: bool
    results: bool
    reasoning: bool


def find_traits(source: str, render: Render) -> Traits:
    """Find what a template reads and renders.

    Args:
        source: the template.
        render: renders messages with it.
    """
    keys = tuple(key for key in _REASONING_KEYS if re.search(rf"\b{key}\b", source))
    wraps = not keys and _END_OF_THOUGHT in source
    parts = _needs_parts(render)
    empty, text = _call_form(render, keys, parts)
    writing = Writing(keys, wraps, parts, empty or "null", text)
    thought = {"reasoning_content": _THOUGHT}

    def shows(sentinel: str, *messages: Message, tools: Sequence[Row] = ()) -> bool:
        written = [writing.write(message) for message in messages]
        return sentinel in (_tried(render, written, tools) or "")

    return Traits(
        writing,
        tools=shows(_NAME, _USER, tools=[_TOOL]),
        calls=empty is not None,
        results=shows(_RESULT, _USER, _CALLING, _RESULT_TURN),
        reasoning=wraps
        or shows(_THOUGHT, _USER, {**_ANSWER_TURN, **thought})
        or shows(_THOUGHT, _USER, {**_CALLING, **thought}),
    )


def _tried(render: Render, messages: Sequence[Message], tools: Sequence[Row] = ()) -> str | None:
    try:
        return render(messages, tools)
    except RowError:
        return None


def _needs_parts(render: Render) -> bool:
    """True if the template renders a list of parts, but not the same content as text."""
    if _ANSWER in (_tried(render, [_USER, _ANSWER_TURN]) or ""):
        return False
    writing = Writing(content_parts=True)
    text = _tried(render, [writing.write(_USER), writing.write(_ANSWER_TURN)])
    return _ANSWER in (text or "")


def _call_form(
    render: Render, keys: tuple[str, ...], parts: bool
) -> tuple[EmptyContent | None, bool]:
    """How a turn that only calls is written, and whether its arguments are text; None if the
    template renders no calls."""
    forms: tuple[EmptyContent, ...] = ("null", "text", "absent")
    for text, empty in product((False, True), forms):
        writing = Writing(keys, False, parts, empty, text)
        rendered = _tried(render, [writing.write(message) for message in (_USER, _CALLING)]) or ""
        shows_all = all(sentinel in rendered for sentinel in (_NAME, _KEY, _VALUE))
        if shows_all and _NOTHING not in rendered:
            return empty, text
    return None, False


def probe_turns(with_call: bool) -> tuple[list[Message], Message]:
    """A question with an answer, plain or a call, and a message that may follow it."""
    return ([_USER, _CALLING], _RESULT_TURN) if with_call else ([_USER, _ANSWER_TURN], _USER)


ANSWER_SENTINEL = _ANSWER
