"""A worker's task and its result, exchanged with the driver; imports no torch."""

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

Report = Callable[[dict[str, float]], None]
"""Receives rank 0's measures of a logged step or an evaluation, with `step` and `tokens`."""


class WorkerTask(TypedDict):
    """The description of a run that each of its workers gets; plain values for any process."""

    recipe: dict[str, Any]
    run: str
    """URI of the run's folder."""
    prepared: str
    """URI of the prepared data set."""
    until: NotRequired[int | None]
    """The step after which to save and stop, before the run's end; None for the whole run."""
    cause: NotRequired[str]
    """Why an earlier attempt of the same driver ended."""


class RetryRequest(TypedDict):
    """Why an attempt ended if another attempt may complete the run; plain values.

    The driver decides what the next attempt does differently (`launch/retries.py`).
    """

    cause: Literal["memory", "not_finite"]
    steps: list[int]
    """The optimizer steps, counted from 1, that failed."""
    rows: str
    """Their source rows, for messages; empty if the cause is not the data."""
    problem: str
    """Short text of what happened, for messages."""


class WorkerResult(TypedDict):
    """The end of a worker's training."""

    status: Literal["finished", "stopped", "failed", "pruned", "retry"]
    error: str | None
    exit_code: int
    retry: NotRequired[RetryRequest]
    """Present if the status is retry."""


class RetryError(Exception):
    """Ends an attempt on all ranks, so that the driver makes another one."""

    def __init__(self, request: RetryRequest) -> None:
        super().__init__(request)
        self.request = request
