"""The shapes to which rows of every format are converted."""

import hashlib
from dataclasses import dataclass

Message = dict[str, str]
"""`role` (system, user, assistant or tool) and `content`."""


class RowError(ValueError):
    """A row does not have the shape of its format."""


@dataclass(frozen=True)
class Conversation:
    """A list of messages that the chat template renders."""

    messages: tuple[Message, ...]
    first_trained: int = 0
    """Index of a message; assistant turns before it are context and are not trained."""

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row, with each message's role."""
        return tuple(part for message in self.messages for part in message.values())


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
    margin: float | None = None
    """By how much the chosen answer is better; None if the data has no margin."""

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

    @property
    def contents(self) -> tuple[str, ...]:
        """All texts of the row."""
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
    return Question(answer.messages[:last], answer.messages[last]["content"])


def share_of(row: Example, purpose: str) -> float:
    """A number in [0, 1) drawn from the row's content: equal rows draw equal numbers."""
    digest = hashlib.blake2b(digest_size=8, person=purpose.encode())
    for part in row.contents:
        digest.update(part.encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "big") / 2**64
