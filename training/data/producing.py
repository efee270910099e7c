"""The driver's side of streamed data: prepares windows ahead of the workers, and deletes those that
they have passed."""

import threading
import time
from bisect import bisect_right
from contextlib import suppress
from typing import Self

from ..common.errors import FinrayError, InputError, RunError, in_one_line
from ..common.formatting import count
from ..common.progress import Progress
from ..common.storage import Folder
from ..config.recipe import Recipe
from .curation.funnel import BAD_ROW
from .fingerprint import fingerprint
from .prepare import Windows, storage_errors
from .prepared import MANIFEST, QUARANTINE, Prepared
from .resolve import identified_data
from .tasks import RunTasks
from .window_files import (
    COUNTS,
    FAILED,
    POSITION,
    SIGNS,
    WindowCounts,
    read_counts,
    read_json,
    window_name,
    write_json,
)

FEWEST_AHEAD, MOST_AHEAD = 2, 8
"""Windows that are prepared before they are needed: the number doubles when workers wait."""
_POLL_SECONDS = 0.1
_POLL_STORE_SECONDS = 1.0
_SIGN_SECONDS = 1.0
_END_SECONDS = 30.0


class Producer:
    """Prepares the windows of a run in a thread, for as long as the context lasts.

    Args:
        recipe: the run's recipe, whose data streams.
        prepared: its first window.
        folder: <run>/windows.
        run_tasks: runs the tasks of a window.
    """

    def __init__(
        self, recipe: Recipe, prepared: Prepared, folder: Folder, run_tasks: RunTasks
    ) -> None:
        self._recipe = recipe
        self._prepared = prepared
        self._folder = folder
        self._run_tasks = run_tasks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="windows", daemon=True)
        self._counts = self._earlier_counts()
        self._signs = _Signs(folder, self._stop)
        self._ahead = FEWEST_AHEAD
        self._waits = 0
        steps = -(-recipe.total_steps(1) // recipe.method.repeats)
        self._stop_position = steps * recipe.rows_per_step
        self._present: set[int] = set()
        self._poll = _POLL_SECONDS if folder.local is not None else _POLL_STORE_SECONDS

    def __enter__(self) -> Self:
        self._folder.create()
        self._clear()  # what an earlier driver left
        self._counts.write(self._folder)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: object,
    ) -> None:
        self._stop.set()
        self._thread.join(_END_SECONDS)
        with suppress(OSError):  # the run is over
            self._clear()

    def _clear(self) -> None:
        for name in self._folder.names():
            if name != COUNTS and not name.endswith(QUARANTINE):
                self._folder.delete(name)

    def _earlier_counts(self) -> WindowCounts:
        """Those of an earlier attempt on the same data, or those of the first window."""
        manifest = self._prepared.manifest
        counts = read_counts(self._folder)
        if counts is not None and counts.prepared == manifest.fingerprint and counts.sequences:
            return counts
        counts = WindowCounts(manifest.fingerprint)
        counts.add(manifest)
        return counts

    def _work(self) -> None:
        try:
            with storage_errors(self._folder):
                self._make_all()
        except _StoppedError:
            return
        except FinrayError as error:
            self._fail(self._recipe.located(str(error)), error.exit_code)
        except BaseException as error:  # noqa: BLE001 - the workers end with it
            self._fail(f"preparing the data failed: {in_one_line(error)}", 1)

    def _make_all(self) -> None:
        """Make windows until the context ends."""
        data = identified_data(self._recipe)
        if fingerprint(self._recipe, data) != self._prepared.manifest.fingerprint:
            raise InputError(
                "data.train: files changed while the run started, and differ from its first "
                "window; start it again"
            )
        windows = Windows(self._recipe, data)
        while not self._stop.is_set():
            number = self._next()
            if number is None:
                self._stop.wait(self._poll)
            else:
                self._make(windows, number)

    def _fail(self, message: str, exit_code: int) -> None:
        with suppress(OSError):  # workers then end as they see no sign of progress
            write_json(self._folder, FAILED, error=message, exit_code=exit_code)

    def _next(self) -> int | None:
        """The next window to prepare; deletes those that are passed."""
        demand = read_json(self._folder, POSITION)
        if demand is None:
            return None
        if demand["waits"] > self._waits:
            self._ahead = min(MOST_AHEAD, 2 * self._ahead)
        self._waits = demand["waits"]
        ends = self._counts.ends
        first = bisect_right(ends, demand["position"])
        last = max(first + self._ahead, demand["awaits"])
        for number in sorted(self._present):
            # One more is kept: messages name rows of the last steps.
            if not first - 1 <= number <= last or not self._is_there(number):
                self._folder.delete(window_name(number))
                self._present.discard(number)
        for number in range(max(1, first), min(last + 1, len(ends))):
            if number not in self._present and self._counts.sequences[number]:
                return number
        return len(ends) if len(ends) <= last and ends[-1] < self._stop_position else None

    def _is_there(self, number: int) -> bool:
        """False if a worker deleted the window, which it had read as damaged."""
        return self._folder.exists(f"{window_name(number)}/{MANIFEST}")

    def _make(self, windows: Windows, number: int) -> None:
        counts = self._counts
        bad = counts.dropped.get(BAD_ROW, 0)
        # A window that is made again is counted already, and was allowed.
        before = bad if number == len(counts.sequences) else -bad, counts.rows_read
        part = windows.part(number, before)
        home = self._folder / window_name(number)
        made = windows.prepare(part, home, self._run_tasks, self._signs)
        self._present.add(number)
        size = made.manifest.train.sequences
        if number == len(counts.sequences):
            counts.add(made.manifest)
            counts.write(self._folder)
            self._refuse_empty(windows)
        elif counts.sequences[number] != size:
            raise RunError(
                f"window {number} of the data has {size} sequences, and had "
                f"{counts.sequences[number]} when it was first prepared: the data changed; restore "
                "it, or start over with --fresh"
            )

    def _refuse_empty(self, windows: Windows) -> None:
        """End when a whole epoch holds nothing to train on."""
        last = self._counts.sequences[-windows.plan.windows :]
        if len(last) < windows.plan.windows or any(last):
            return
        dropped = [f"{reason} {count(n)}" for reason, n in self._counts.dropped.items()]
        raise InputError(
            f"data.train: no sequence is left to train on: {count(self._counts.rows_read)} rows "
            f"read, dropped: {', '.join(dropped) or 'none'}; change what drops them, or add data"
        )


class _StoppedError(Exception):
    """Ends the thread in the middle of a window."""


class _Signs(Progress):
    """Shows the workers that windows are being prepared."""

    def __init__(self, folder: Folder, stop: threading.Event) -> None:
        self._folder = folder
        self._stop = stop
        self._count = 0
        self._shown = 0.0

    def advance(self, done: int, total: int) -> None:
        """Note a finished task."""
        if self._stop.is_set():
            raise _StoppedError
        self.show()

    def show(self) -> None:
        """Change the sign, at most once a second."""
        if time.monotonic() - self._shown >= _SIGN_SECONDS:
            self._count += 1
            write_json(self._folder, SIGNS, count=self._count)
            self._shown = time.monotonic()
