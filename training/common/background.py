"""Work in a thread of its own."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def beside(work: Callable[[], T], name: str) -> "Future[T]":
    """Start work in a daemon thread, so that a process which is told to end need not wait for it.

    Args:
        work: what to do.
        name: the thread's.

    Returns:
        What comes of it; its `result()` raises what the work raised.
    """
    outcome: Future[T] = Future()

    def carry() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - carried to whoever asks for the result
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    Thread(target=carry, name=name, daemon=True).start()
    return outcome
