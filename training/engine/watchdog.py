"""Notices that a worker hangs: a thread beside the training, armed while a step runs."""

import faulthandler
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from ..common.storage import Folder
from ..records.run_folder import STACKS_FOLDER

_FLOOR_SECONDS = 300.0
_FACTOR = 10.0
_STEPS = 20
_TICK = 0.5
_WRITE_SECONDS = 30.0
"""For the stacks; a storage that hangs as well does not keep the process."""


class Watchdog:
    """Calls `on_hang` once, in its own thread, when a step takes too long.

    Neither the first step, which compiles, nor evaluations, answers and saves are timed. Time in
    which the whole process was stopped, as by Ctrl-Z, does not count.

    Args:
        timeout: seconds; auto goes by the longest of the last steps; None for no watch.
        on_hang: called with the seconds that the step has taken.
    """

    def __init__(
        self, timeout: float | Literal["auto"] | None, on_hang: Callable[[float], None]
    ) -> None:
        self._timeout = timeout
        self._on_hang = on_hang
        self._lock = threading.Lock()
        self._since: float | None = None
        self._last: deque[float] = deque(maxlen=_STEPS)
        self._waited: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._timeout is not None:
            self._thread.join()

    def arm(self) -> None:
        """A step begins, and one that was timed has ended."""
        with self._lock:
            self._note()
            self._since = time.monotonic()
            self._waited = 0.0

    def disarm(self) -> None:
        """What comes now is no step, and one that was timed has ended."""
        with self._lock:
            self._note()
            self._since = self._waited = None

    def _note(self) -> None:
        if self._since is not None:
            self._last.append(time.monotonic() - self._since)

    @property
    def limit(self) -> float:
        """Seconds that a step may take now."""
        if isinstance(self._timeout, int | float):
            return self._timeout
        return max(_FLOOR_SECONDS, _FACTOR * max(self._last, default=0.0))

    def _watch(self) -> None:
        tick = min(_TICK, self.limit / 4)
        while not self._ended.wait(tick):
            with self._lock:
                if self._waited is None:
                    continue
                self._waited += tick  # by ticks, not by the clock, which a stop does not stop
                waited = self._waited
                hangs = waited >= self.limit
            if hangs:
                self._on_hang(waited)
                return


def write_stacks(run: Folder, rank: int, step: int) -> str:
    """Write every thread's stack to stderr and into the run's folder; returns the file's name."""
    name = f"{STACKS_FOLDER}/rank-{rank}-step-{step}.txt"
    with tempfile.TemporaryFile() as stream:
        faulthandler.dump_traceback(stream, all_threads=True)
        stream.seek(0)
        content = stream.read()
    print(content.decode("utf-8", "replace"), file=sys.stderr, flush=True)
    writer = threading.Thread(target=_write, args=(run, name, content), daemon=True)
    writer.start()
    writer.join(_WRITE_SECONDS)
    return name


def _write(run: Folder, name: str, content: bytes) -> None:
    (run / STACKS_FOLDER).create()
    run.write(name, content)
