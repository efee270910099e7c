"""Work in a thread of its own, and the request to stop it."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Stop:
    """A request to save and end, from a signal handler to whoever runs the training."""

    requested: Event = field(default_factory=Event)
    armed: bool = False
    """Whether a request is answered with a save; before that it ends the process at once."""


def run_in_thread(work: Callable[[], T], name: str) -> "Future[T]":
    """Start work in a daemon thread, so that a process which ends need not wait for it.

    Args:
        work: what to do.
        name: the thread's.

    Returns:
        Its outcome; `result()` raises what the work raised.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised by `result()`
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    Thread(target=run, name=name, daemon=True).start()
    return outcome


def run_while_watching(
    work: Callable[[], T],
    stop: Stop,
    on_stop: Callable[[], None] = lambda: None,
    on_tick: Callable[[], None] = lambda: None,
) -> T:
    """Do work in a thread, so that this one keeps the signal handlers (Ray takes them otherwise).

    Args:
        work: what to do; its result is returned, and what it raises is raised.
        stop: armed from here on.
        on_stop: called once, when the stop is requested.
        on_tick: called five times a second.
    """
    stop.armed = True
    outcome = run_in_thread(work, "ray-work")
    is_stopping = False
    while not outcome.done():
        wait((outcome,), 0.2)
        if stop.requested.is_set() and not is_stopping:
            on_stop()
            is_stopping = True
        on_tick()
    return outcome.result()
