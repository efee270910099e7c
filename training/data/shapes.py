"""The shapes that rows of every format are brought to."""

import hashlib
from dataclasses import dataclass

Message = dict[str, str]
"""`role` (system, user, assistant or tool) and `content`."""


class RowError(ValueError):
    """A row does not have the shape of its format."""


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered with the chat template."""

    messages: tuple[Message, ...]
    first_trained: int = 0
    """Assistant turns before this message are context, and are not trained on."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row, with each message's role."""
        return tuple(part for message in self.messages for part in message.values())


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both verbatim."""

    prompt: str
    completion: str

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row."""
        return (self.prompt, self.completion)


@dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row."""
        return (self.text,)


Answer = Conversation | Completion
"""A prompt with an answer to it."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to the same prompt, of which one is preferred."""

    chosen: Answer
    rejected: Answer
    margin: float | None = None
    """By how much the chosen one is better, where the data says it."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row."""
        return self.chosen.contents + self.rejected.contents


@dataclass(frozen=True)
class LabelledExample:
    """An answer that is labelled good or bad."""

    answer: Answer
    label: bool

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row."""
        return self.answer.contents


@dataclass(frozen=True)
class Question:
    """A prompt that the model itself is to answer: messages, or text verbatim."""

    prompt: tuple[Message, ...] | str
    reference: str | None = None
    """A good answer, where the data has one."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Every text of the row."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        return tuple(part for message in self.prompt for part in message.values())


Example = Conversation | Completion | Text | PreferencePair | LabelledExample | Question

SHAPES: dict[type[Example], str] = {
    Conversation: "conversations",
    Completion: "prompts with completions",
    Text: "plain texts",
    PreferencePair: "pairs of a chosen and a rejected answer",
    LabelledExample: "answers with a label",
    Question: "prompts without an answer",
}
"""Their names in messages."""

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
    """Whether a chat template renders it."""
    return isinstance(part, Conversation) or (
        isinstance(part, Question) and not isinstance(part.prompt, str)
    )


def question_of(answer: Answer) -> Question:
    """The prompt of an answer; everything before the last assistant turn of a conversation."""
    if isinstance(answer, Completion):
        return Question(answer.prompt, answer.completion)
    roles = [message["role"] for message in answer.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    return Question(answer.messages[:last], answer.messages[last]["content"])


def share_of(row: Example, purpose: str) -> float:
    """A number in [0, 1) drawn from the row's content: equal rows draw equal numbers."""
    digest = hashlib.blake2b(digest_size=8, person=purpose.encode())
    for part in row.contents:
        digest.update(part.encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "big") / 2**64
