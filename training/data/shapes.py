"""The shapes to which rows of every format are converted."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role` (system, user, assistant or tool) and `content`, which is text, or None in a turn that
only calls tools. Perhaps `reasoning_content`, `tool_calls`, `tool_call_id`, `name`, and other keys
that a chat template may read."""


class RowError(ValueError):
    """A row does not have the shape of its format."""


@dataclass(frozen=True)
class ChatContext:
    """What the chat template reads beside the messages."""

    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the model may call, each {type: function, function: {name, …}}."""
    options: dict[str, Any] = field(default_factory=dict)
    """The row's own settings for the template."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Tools and settings as text."""
        values = (*self.tools, *([self.options] if self.options else []))
        return tuple(map(_as_text, values))


NO_CONTEXT = ChatContext()


@dataclass(frozen=True)
class Conversation:
    """A list of messages that the chat template renders."""

    messages: tuple[Message, ...]
    first_trained: int = 0
    """Index of a message; assistant turns before it are context and are not trained."""
    context: ChatContext = NO_CONTEXT
    silent: frozenset[int] = frozenset()
    """Indices of messages whose weight is 0: they are not trained."""

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row, with each message's role."""
        return (*_texts(self.messages), *self.context.contents)


def essence(message: Message) -> Message:
    """What a message says: without ids, and keys that only some templates read."""
    calls = message.get("tool_calls")
    return {
        "role": message["role"],
        "content": message["content"] or "",
        **{key: message[key] for key in ("reasoning_content", "name") if key in message},
        **({"tool_calls": [call["function"] for call in calls]} if calls else {}),
    }


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        for value in essence(message).values():
            yield value if isinstance(value, str) else _as_text(value)


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def answer_text(message: Message) -> str:
    """An answer as text: its content, or its calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = (
        message["content"],
        json.dumps(calls, ensure_ascii=False, default=str) if calls else None,
    )
    return "\n".join(text for text in texts if text)


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it; both are used verbatim."""

    prompt: str
    completion: str

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
        return (self.prompt, self.completion)


@dataclass(frozen=True)
class Text:
    """A plain text, all of which is trained."""

    text: str

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
        return (self.text,)


Answer = Conversation | Completion
"""A prompt with an answer to it."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to the same prompt, of which one is preferred."""

    chosen: Answer
    rejected: Answer

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
        return self.chosen.contents + self.rejected.contents


@dataclass(frozen=True)
class LabelledExample:
    """An answer that is labelled good or bad."""

    answer: Answer
    label: bool

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
        return self.answer.contents


@dataclass(frozen=True)
class Question:
    """A prompt for the model to answer: messages, or a text that is used verbatim."""

    prompt: tuple[Message, ...] | str
    reference: str | None = None
    """A good answer; None if the data has none."""
    context: ChatContext = NO_CONTEXT

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        return (*_texts(self.prompt), *self.context.contents)


Example = Conversation | Completion | Text | PreferencePair | LabelledExample | Question

SHAPES: dict[type[Example], str] = {
    Conversation: "conversations",
    Completion: "prompts with completions",
    Text: "plain texts",
    PreferencePair: "pairs of a chosen and a rejected answer",
    LabelledExample: "answers with a label",
    Question: "prompts without an answer",
}
"""The name of each shape in messages."""

Part = Conversation | Completion | Text | Question
"""A text that is rendered and tokenised as a whole."""


def parts_of(row: Example) -> tuple[Part, ...]:
    """The texts of a row: both answers of a pair, the chosen one first; otherwise one."""
    if isinstance(row, PreferencePair):
        return row.chosen, row.rejected
    if isinstance(row, LabelledExample):
        return (row.answer,)
    return (row,)


def is_chat(part: Part) -> bool:
    """True if the part is rendered with the chat template."""
    return isinstance(part, Conversation) or (
        isinstance(part, Question) and not isinstance(part.prompt, str)
    )


def question_of(answer: Answer) -> Question:
    """The prompt of an answer with the answer as reference. The prompt of a conversation is
    everything before its last assistant turn."""
    if isinstance(answer, Completion):
        return Question(answer.prompt, answer.completion)
    roles = [message["role"] for message in answer.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    reference = answer_text(answer.messages[last])
    return Question(answer.messages[:last], reference, answer.context)


def share_of(row: Example, purpose: str) -> float:
    """A number in [0, 1) drawn from the row's content: equal rows draw equal numbers."""
    digest = hashlib.blake2b(digest_size=8, person=purpose.encode())
    for part in row.contents:
        digest.update(part.encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "big") / 2**64
