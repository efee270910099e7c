"""Makes items in a thread before they are needed, as far ahead as the consumer's waits ask for."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

MOST_AHEAD = 4
"""Items that are held at most."""
_NOTICEABLE_SECONDS = 0.05
_TICK_SECONDS = 0.5

T = TypeVar("T")


class Prefetch(Generic[T]):
    """An iterator whose items a thread takes from another one before they are needed.

    One item is held at first. Whenever the consumer has to wait, the number doubles: items then
    take an uneven time, and a reserve helps. As a context manager it ends the thread on exit.

    Args:
        items: where the thread takes them from; what it raises is raised here, in its place.
        on_wait: called twice a second while the consumer waits.
    """

    def __init__(self, items: Iterator[T], on_wait: Callable[[], None] = lambda: None) -> None:
        self._items = items
        self._on_wait = on_wait
        self._ready: deque[T] = deque()
        self._error: BaseException | None = None
        self._is_at_end = False
        self._is_first = True
        self.ahead = 1
        """Items that are held now."""
        self.waits = 0
        """How often the consumer has waited noticeably, but for the first item."""
        self.closed = threading.Event()
        self._changed = threading.Condition()
        threading.Thread(target=self._fill, name="prefetch", daemon=True).start()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        started = time.monotonic()
        while True:
            with self._changed:
                if not self._ready and not self._is_at_end:
                    self._changed.wait(_TICK_SECONDS)
                if self._ready:
                    self._adapt(time.monotonic() - started)
                    self._changed.notify_all()
                    return self._ready.popleft()
                if self._is_at_end:
                    raise self._error or StopIteration
            self._on_wait()

    def _adapt(self, waited: float) -> None:
        if waited > _NOTICEABLE_SECONDS and not self._is_first:
            self.waits += 1
            self.ahead = min(MOST_AHEAD, 2 * self.ahead)
        self._is_first = False

    def _fill(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    while len(self._ready) >= self.ahead and not self.closed.is_set():
                        self._changed.wait()
                    if self.closed.is_set():
                        return
        except BaseException as error:  # noqa: BLE001 - raised by the consumer
            self._error = error
        finally:
            with self._changed:
                self._is_at_end = True
                self._changed.notify_all()
