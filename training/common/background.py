"""Work in a background thread, and the request to stop it."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Stop:
    """A request to save and stop, from a signal handler to the code that runs the training."""

    requested: Event = field(default_factory=Event)
    armed: bool = False
    """True if a request leads to a save; before that, it ends the process at once."""


def run_in_thread(work: Callable[[], T], name: str) -> "Future[T]":
    """Start work in a daemon thread, so that the process can exit without waiting for it.

    Args:
        work: the function to run.
        name: name of the thread.

    Returns:
        A future; `result()` returns what the work returned, or raises what it raised.
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
    """Run work in a thread, because Ray would replace the signal handlers of this one.

    Args:
        work: the function to run; its result is returned, and its exception is raised.
        stop: armed by this call.
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
