"""What the driver hands to a worker, and what comes back; without torch, for both sides."""

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

Report = Callable[[dict[str, float]], None]
"""Receives rank 0's measures of a logged step or an evaluation, with `step` and `tokens`."""


class WorkerTask(TypedDict):
    """A run, as each of its workers gets it; plain values, so that any process can read it."""

    recipe: dict[str, Any]
    run: str
    """URI of the run's folder."""
    prepared: str
    """URI of the prepared data set."""
    until: NotRequired[int | None]
    """A step to save and stop after, before the run's end."""
    cause: NotRequired[str]
    """Why an earlier attempt of the same driver ended."""


class RetryRequest(TypedDict):
    """Why an attempt ended that another attempt may complete; plain values.

    The driver decides what the next attempt does differently (`launch/retries.py`).
    """

    cause: Literal["memory", "not_finite"]
    steps: list[int]
    """The optimizer steps, counted from 1, that failed."""
    rows: str
    """Their source rows, for people; empty where they do not matter."""
    problem: str
    """What happened, in a few words."""


class WorkerResult(TypedDict):
    """How a worker's part ended."""

    status: Literal["finished", "stopped", "failed", "pruned", "retry"]
    error: str | None
    exit_code: int
    retry: NotRequired[RetryRequest]
    """With that status."""


class RetryError(Exception):
    """Ends an attempt on all ranks, so that the driver makes another one."""

    def __init__(self, request: RetryRequest) -> None:
        super().__init__(request)
        self.request = request
