"""Joins messages with Harmony's channels: analysis, calls and answer of a turn are one message."""

from .shapes import Message, RowError
from .tool_fields import call_to

_PEOPLE = ("user", "assistant", "all")
_FUNCTIONS = "functions."
_KEYS = ("channel", "recipient", "content_type")


def join_channels(messages: list[Message], name: str) -> list[Message]:
    """The messages with one assistant message a turn; others are returned as they are.

    Raises:
        RowError: a channel is unknown, a call is not JSON, or nothing follows an analysis.
    """
    if not any("channel" in message or "recipient" in message for message in messages):
        return messages
    joined: list[Message] = []
    thoughts: list[str] = []
    for index, message in enumerate(messages):
        place = f"{name}[{index}]"
        channel, recipient = message.get("channel"), message.get("recipient")
        rest = {key: value for key, value in message.items() if key not in _KEYS}
        if rest["role"] == "tool" and "name" in rest:
            rest["name"] = str(rest["name"]).removeprefix(_FUNCTIONS)
        if rest["role"] != "assistant":
            _check_nothing_is_left(thoughts, place)
            joined.append(rest)
        elif recipient is not None and recipient not in _PEOPLE:
            joined.append(_call(rest, str(recipient), thoughts, place))
        elif channel == "analysis":
            thoughts.append(rest["content"] or "")
        elif channel in ("final", "commentary", None):
            joined.append(_with_thoughts(rest, thoughts))
        else:
            raise RowError(
                f"{place}.channel is {channel!r}; expected analysis, commentary or final"
            )
    _check_nothing_is_left(thoughts, name)
    return joined


def _call(message: Message, recipient: str, thoughts: list[str], place: str) -> Message:
    call = call_to(recipient.removeprefix(_FUNCTIONS), message["content"], f"{place}.content")
    return _with_thoughts({**message, "content": None, "tool_calls": [call]}, thoughts)


def _with_thoughts(message: Message, thoughts: list[str]) -> Message:
    """The message with the analysis before it, which is taken out of `thoughts`."""
    if not thoughts:
        return message
    reasoning = "\n".join(thoughts)
    thoughts.clear()
    return {**message, "reasoning_content": reasoning}


def _check_nothing_is_left(thoughts: list[str], place: str) -> None:
    if thoughts:
        raise RowError(f"{place}: no answer and no call follows the analysis before it")
