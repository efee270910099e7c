"""The interface of a loaded reward: it gets completions and returns one value for each."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...data.shapes import Message, answer_text

Turns = str | list[Message]
"""A prompt or a completion: text, or messages if the data has messages."""


@dataclass(frozen=True)
class Completions:
    """Completions to score; every list has one item for each completion."""

    prompts: list[Turns]
    completions: list[Turns]
    """Text; for prompts of messages, a list of one assistant message."""
    completion_ids: list[list[int]]
    """Token ids, including the token that ended the completion."""
    columns: dict[str, list[Any]]
    """The rows' other columns, by name; None for a row without the column."""

    def only(self, index: int) -> "Completions":
        """Only the completion at this index."""
        return Completions(
            [self.prompts[index]],
            [self.completions[index]],
            [self.completion_ids[index]],
            {name: [values[index]] for name, values in self.columns.items()},
        )

    def copied(self) -> "Completions":
        """The same completions in objects of their own."""
        return copy.deepcopy(self)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardValues:
    """The values of one reward, one for each completion."""

    values: list[float | None]
    """None if the reward does not apply, or failed."""
    failures: int = 0
    """Number of values that are None because the reward failed."""


class Reward(Protocol):
    """A loaded reward of the recipe."""

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
    return "\n".join(f"{turn['role']}: {answer_text(turn)}" for turn in turns)


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns; a row without a column has None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
