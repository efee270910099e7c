"""Why an attempt at a run ended, where another attempt can cure it.

A worker raises `AttemptOver`; the driver (attempts.py) decides what the next attempt does
differently, or that there is none.
"""

from typing import Literal, TypedDict


class Restart(TypedDict):
    """What a worker tells of an attempt's end; plain values."""

    cause: Literal["memory", "not_finite"]
    steps: list[int]
    """The optimizer steps, counted from 1, that did not come about."""
    rows: str
    """Their source rows, for people; empty where they do not matter."""
    found: str
    """What was met, in a few words."""


class AttemptOver(Exception):
    """Ends an attempt on all ranks; the driver hears of it."""

    def __init__(self, restart: Restart) -> None:
        super().__init__(restart)
        self.restart = restart


_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host could not allocate what torch asked for."""
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)
