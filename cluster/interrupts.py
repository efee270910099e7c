"""Ctrl-C and SIGTERM: once saves and leaves, twice leaves at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..training.common.background import Stop


@contextmanager
def graceful_interrupts(stop: Stop) -> Iterator[None]:
    """Inside, a first signal requests a stop where one is answered (`stop.armed`).

    A signal before that, or a second one, raises KeyboardInterrupt.
    """

    def handle(_: int, __: FrameType | None) -> None:
        if not stop.armed or stop.requested.is_set():
            raise KeyboardInterrupt
        stop.requested.set()
        print("\nsaving, then leaving; again to leave at once", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
