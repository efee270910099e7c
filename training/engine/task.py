"""A worker's task and its result, exchanged with the driver; imports no torch."""

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypedDict

from ..config.sections import Isolation
from .heartbeat import Phase

Report = Callable[[dict[str, float]], None]
"""Receives rank 0's measures of a logged step or an evaluation, with `step` and `tokens`."""


class WorkerTask(TypedDict):
    """The description of a run that each of its workers gets; plain values for any process."""

    recipe: dict[str, Any]
    run: str
    """URI of the run's folder."""
    prepared: str
    """URI of the prepared data set."""
    isolation: NotRequired[Isolation | None]
    """How the model keeps the documents of a packed row apart; None if no row is packed."""
    shares_prefixes: NotRequired[bool]
    """Whether texts of a row that begin with the same tokens share them."""
    left_out: NotRequired[list[str]]
    """Patterns of parameters that get no gradient, and are not trained."""
    until: NotRequired[int | None]
    """The step after which to save and stop, before the run's end; None for the whole run."""
    schedule: NotRequired[list[int] | None]
    """The last step of each learning-rate schedule, the run's last step among them; None for one
    schedule over the whole run."""
    evaluation_parts: NotRequired[int]
    """Into how many parts an evaluation's batches are divided, after it ran out of memory; 1 for
    none."""
    cause: NotRequired[str]
    """Why an earlier attempt of the same driver ended."""
    unusable: NotRequired[dict[str, str]]
    """Checkpoints that an earlier attempt could not load, and why, by their names."""


class RetryRequest(TypedDict):
    """Why an attempt ended if another attempt may complete the run; plain values.

    The driver decides what the next attempt does differently (`launch/retries.py`).
    """

    cause: Literal["memory", "not_finite", "data", "checkpoint"]
    """data: the prepared data is damaged. checkpoint: the one of this step has the right hashes,
    but cannot be loaded."""
    steps: list[int]
    """The optimizer steps, counted from 1, that failed; empty if the cause is damaged data."""
    rows: str
    """Their source rows, for messages; empty if the cause is not the data."""
    problem: str
    """Short text of what happened, for messages."""
    phase: NotRequired[Phase]
    """What the worker did; present if the cause is memory."""


class WorkerResult(TypedDict):
    """The end of a worker's training."""

    status: Literal["finished", "stopped", "failed", "pruned", "retry"]
    error: str | None
    exit_code: int
    retry: NotRequired[RetryRequest]
    """Present if the status is retry."""


STEP_NOTE = "finray: "
"""Begins the note of an error that names the step in which it was raised."""


def repeats_as(error: BaseException) -> str | None:
    """A text that is equal for the same error in the same step; None if a restart may cure it."""
    notes = [note for note in error.__dict__.get("__notes__", ()) if note.startswith(STEP_NOTE)]
    return f"{type(error).__name__} {notes[-1]}: {error}" if notes else None


class RetryError(Exception):
    """Ends an attempt on all ranks, so that the driver makes another one."""

    def __init__(self, request: RetryRequest) -> None:
        super().__init__(request)
        self.request = request
