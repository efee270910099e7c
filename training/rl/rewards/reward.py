"""What every kind of reward is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...data.shapes import Message

Turns = str | list[Message]
"""A prompt or a completion: text, or messages where the data has them."""


@dataclass(frozen=True)
class Completions:
    """Completions to be judged, one an index in every list."""

    prompts: list[Turns]
    completions: list[Turns]
    """Text; for prompts of messages, a list of one message of the assistant."""
    completion_ids: list[list[int]]
    """Tokens, with the one that ended the completion."""
    columns: dict[str, list[Any]]
    """The row's other columns; a row that lacks one has None."""

    def only(self, index: int) -> "Completions":
        """One of them."""
        return Completions(
            [self.prompts[index]],
            [self.completions[index]],
            [self.completion_ids[index]],
            {name: [values[index]] for name, values in self.columns.items()},
        )

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Judgement:
    """What one reward says of completions."""

    values: list[float | None]
    """None: not applicable, or not known."""
    failures: int = 0
    """How many of them are None because the reward failed."""


class Judge(Protocol):
    """A reward of the recipe, loaded."""

    name: str
    weight: float

    def judge(self, completions: Completions) -> Judgement:
        """What each completion is worth.

        Raises:
            RunError: the reward failed, and the recipe does not let it.
        """


def told(turns: Turns) -> str:
    """A prompt or completion for people."""
    if isinstance(turns, str):
        return turns
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of columns as columns of rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
