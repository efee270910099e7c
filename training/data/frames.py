"""Finds the answers of a conversation where those of another one of the same form stand.

To prove that a text has all answers as the model writes them takes two renderings of each answer.
A template decides by the form of a conversation: who speaks, what each message has, and whether a
content holds one of the template's own literals. So the proof is made once for each form, and later
conversations of the form are rendered once; their special tokens show where the answers stand.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from .chat import ChatTemplate, Span
from .shapes import Conversation, Message

_KEPT = 10_000
_LONGEST = 80
"""Characters from a special token to the border of an answer."""


@dataclass(frozen=True)
class _Place:
    """A position in a text, counted from a special token."""

    piece: int
    """Number of the special token."""
    prefix: str
    """The text from there to the position."""


@dataclass(frozen=True)
class _Frame:
    """Where the answers stand in the texts of a form; none if such a text cannot have all."""

    pieces: int
    answers: tuple[tuple[_Place, _Place], ...]


class Frames:
    """The forms of the conversations that were read with a chat template.

    Args:
        starts: finds the special tokens of a text, and its beginning.
    """

    def __init__(self, starts: Callable[[str], list[int]]) -> None:
        self._starts = starts
        self._frames: dict[Hashable, _Frame] = {}

    def find(
        self, template: ChatTemplate, conversation: Conversation, turns: Sequence[int], text: str
    ) -> list[Span] | None:
        """The answers in a conversation's text; None if its form is new, or no frame fits.

        Args:
            template: the chat template.
            conversation: the conversation.
            turns: indices of the trained answers.
            text: its rendering up to the last of them.
        """
        frame = self._frames.get(_form(template, conversation, turns))
        if frame is None:
            return None
        starts = self._starts(text)
        if len(starts) != frame.pieces:
            return None
        spans: list[Span] = []
        for places in frame.answers:
            if not all(text.startswith(place.prefix, starts[place.piece]) for place in places):
                return None
            first, last = (starts[place.piece] + len(place.prefix) for place in places)
            spans.append((first, last))
        return spans

    def learn(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        turns: Sequence[int],
        text: str,
        answers: Sequence[Span],
    ) -> None:
        """Keep where the answers of a conversation stand in its text."""
        starts = self._starts(text)
        places = tuple(
            (_place(text, starts, first), _place(text, starts, last)) for first, last in answers
        )
        if any(len(place.prefix) > _LONGEST for pair in places for place in pair):
            return
        if len(self._frames) >= _KEPT:
            self._frames.clear()
        self._frames[_form(template, conversation, turns)] = _Frame(len(starts), places)


def _place(text: str, starts: Sequence[int], position: int) -> _Place:
    piece = bisect_right(starts, position) - 1
    return _Place(piece, text[starts[piece] : position])


def _form(template: ChatTemplate, conversation: Conversation, turns: Sequence[int]) -> Hashable:
    """What a template may decide by."""
    messages = conversation.messages[: turns[-1] + 1]
    return (
        template.source,
        tuple(turns),
        tuple(_form_of(message, template.literals) for message in messages),
        len(conversation.context.tools),
        repr(conversation.context.options),
    )


def _form_of(message: Message, literals: Sequence[str]) -> Hashable:
    content = message["content"] or ""
    thought = message.get("reasoning_content", "")
    return (
        tuple((key, value is None) for key, value in message.items()),
        message["role"],
        len(message.get("tool_calls", ())),
        tuple(tuple(call["function"]["arguments"]) == () for call in message.get("tool_calls", ())),
        *((text == text.lstrip(), text == text.rstrip()) for text in (content, thought)),
        tuple(literal for literal in literals if literal in content or literal in thought),
    )
