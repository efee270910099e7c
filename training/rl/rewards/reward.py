"""The interface of a loaded reward: completions in, one value for each out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...data.shapes import Message

Turns = str | list[Message]
"""A prompt or a completion: text, or messages where the data has them."""


@dataclass(frozen=True)
class Completions:
    """Completions to score; every list has one item for each completion."""

    prompts: list[Turns]
    completions: list[Turns]
    """Text; for prompts of messages, a list of one message of the assistant."""
    completion_ids: list[list[int]]
    """Tokens, with the one that ended the completion."""
    columns: dict[str, list[Any]]
    """The row's other columns; a row that lacks one has None."""

    def only(self, index: int) -> "Completions":
        """The completion at an index alone."""
        return Completions(
            [self.prompts[index]],
            [self.completions[index]],
            [self.completion_ids[index]],
            {name: [values[index]] for name, values in self.columns.items()},
        )

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardValues:
    """One reward's values of completions."""

    values: list[float | None]
    """None: the reward does not apply, or failed."""
    failures: int = 0
    """How many of them are None because the reward failed."""


class Reward(Protocol):
    """A reward of the recipe, loaded."""

    name: str
    weight: float

    def score(self, completions: Completions) -> RewardValues:
        """The value of each completion.

        Raises:
            RunError: the reward failed, and `on_reward_error` is fail.
        """


def as_text(turns: Turns) -> str:
    """A prompt or completion as text, with a line for each message."""
    if isinstance(turns, str):
        return turns
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of columns as columns of rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
