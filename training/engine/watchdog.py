"""Detects a hanging worker: a thread that is armed while a step runs."""

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
"""Time limit for writing the stacks: a storage that hangs must not block the process."""


class Watchdog:
    """Calls `on_hang` once, in its own thread, when a step takes too long.

    It does not time the first step, which compiles, nor evaluations, answers and saves. Time while
    the whole process is stopped, for example by Ctrl-Z, does not count.

    Args:
        timeout: limit in seconds; auto derives it from the longest recent step; None disables it.
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
        self._elapsed: float | None = None
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
        """Start to time a step; ends the timing of the previous one."""
        with self._lock:
            self._record_duration()
            self._since = time.monotonic()
            self._elapsed = 0.0

    def disarm(self) -> None:
        """End the timing of a step without starting another."""
        with self._lock:
            self._record_duration()
            self._since = self._elapsed = None

    def _record_duration(self) -> None:
        if self._since is not None:
            self._last.append(time.monotonic() - self._since)

    @property
    def limit(self) -> float:
        """Seconds that a step may take at present."""
        if isinstance(self._timeout, int | float):
            return self._timeout
        return max(_FLOOR_SECONDS, _FACTOR * max(self._last, default=0.0))

    def _watch(self) -> None:
        tick = min(_TICK, self.limit / 4)
        while not self._ended.wait(tick):
            with self._lock:
                if self._elapsed is None:
                    continue
                # Ticks, not the clock: the clock continues while the process is stopped.
                self._elapsed += tick
                elapsed = self._elapsed
                hangs = elapsed >= self.limit
            if hangs:
                self._on_hang(elapsed)
                return


def write_stacks(run: Folder, rank: int, step: int) -> str:
    """Write the stacks of all threads to stderr and the run's folder; returns the file's name."""
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
