"""What the driver tells a worker, and what comes back; without torch, for both sides."""

from typing import Any, Literal, NotRequired, TypedDict

from .restart import Restart


class Job(TypedDict):
    """What a worker is told; plain values, so that any process can read it."""

    recipe: dict[str, Any]
    run: str
    """URI of the run's folder."""
    prepared: str
    """URI of the prepared data set."""
    until: NotRequired[int | None]
    """A step to save and stop after, before the run's end."""
    cause: NotRequired[str]
    """Why an earlier attempt of the same driver ended."""


class Outcome(TypedDict):
    """How a worker's part ended."""

    status: Literal["finished", "stopped", "failed", "pruned", "restart"]
    error: str | None
    exit_code: int
    restart: NotRequired[Restart]
    """With that status: another attempt may cure what ended this one."""
