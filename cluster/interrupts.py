"""Ctrl-C and SIGTERM: the first saves a checkpoint and exits, the second exits immediately."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..training.common.background import Stop

_MESSAGE = "\nSaving a checkpoint, then exiting. Press Ctrl-C again to exit immediately."


@contextmanager
def graceful_interrupts(stop: Stop) -> Iterator[None]:
    """Inside the context, a first signal requests `stop` if that is armed.

    A signal before that, and a second one, raise KeyboardInterrupt.
    """

    def handle(_: int, __: FrameType | None) -> None:
        if not stop.armed or stop.requested.is_set():
            raise KeyboardInterrupt
        stop.requested.set()
        print(
            "\nSaving a checkpoint, then exiting. Press Ctrl-C again to exit immediately.",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
