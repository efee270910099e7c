"""A worker's side of streamed data: its rows of each step, from the windows that the driver makes.

All windows one behind the other are the stream; step s uses positions [s*B, (s+1)*B) of it, for
any number of workers. A worker gets the rows of a step when all of the step's windows exist, so
that all workers wait for the same ones, and at the same time.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..common.errors import InputError, RunError
from ..common.storage import Folder
from .prefetch import Prefetch
from .prepared import MANIFEST, DamagedDataError, Manifest, Prepared, open_prepared
from .sources import Chunk, SourceFile
from .stream import Sequence, Window, owner, read_groups, sequences_of, window_order
from .window_files import FAILED, POSITION, SIGNS, read_counts, read_json, window_name, write_json
from .window_plan import place_in_file

PATIENCE_SECONDS = 900.0
"""How long a worker waits for a window without a sign that anyone makes it; on a cluster, the first
tasks may have to wait for processes."""
_POLL_SECONDS = 0.1
_POLL_STORE_SECONDS = 1.0
_TRIES = 3

Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Opened:
    """A window that exists."""

    number: int
    start: int
    """Global position of its first sequence."""
    files: Folder
    manifest: Manifest

    @property
    def end(self) -> int:
        """Global position behind its last sequence."""
        return self.start + self.manifest.train.sequences


class StreamedWindows:
    """The windows of a run, as a worker sees them.

    Args:
        folder: <run>/windows.
        prepared: the first window.
        seed: the recipe's.
        patience: seconds to wait for a window without any sign of progress.
    """

    def __init__(
        self, folder: Folder, prepared: Prepared, seed: int, patience: float = PATIENCE_SECONDS
    ) -> None:
        self._folder = folder
        self._prepared = prepared
        self._seed = seed
        self._patience = patience
        self._poll = _POLL_SECONDS if folder.local is not None else _POLL_STORE_SECONDS
        self._ends: list[int] = []
        self._waits = 0
        self._sign: Any = None
        self._looks = 0
        self._position = 0
        self._is_said = True
        """False if the latest position could not be written."""
        self._awaits = 0
        """The window without which the reader does not go on."""

    def need(self, position: int) -> None:
        """Say which sequence is the first that is still needed: by one worker for all."""
        self._position = position
        demand = {"position": position, "waits": self._waits, "awaits": self._awaits}
        try:
            write_json(self._folder, POSITION, **demand)
            self._is_said = True
        except OSError:  # the driver meets it too, and says what to do
            self._is_said = False

    def rows(
        self,
        batch_size: int,
        rank: int,
        world_size: int,
        steps: tuple[int, int],
        beat: Callable[[], None],
    ) -> Iterator[Sequence]:
        """A worker's sequences of steps [start, stop), in order.

        Args:
            batch_size: sequences of a step.
            rank: the worker.
            world_size: number of workers.
            steps: the steps, counted from 0.
            beat: called while it waits; without progress of the driver's, that ends.

        Raises:
            InputError: the driver cannot prepare the data.
            RunError: it does not answer, or its storage is full.
        """
        closed = threading.Event()
        tables = self._tables(batch_size, (rank, world_size), steps, closed)
        seen = asked = 0

        def waiting() -> None:
            nonlocal seen, asked
            if self._looks != seen:  # the thread that reads does not hang
                seen = self._looks
                beat()
            # A step may take several windows.
            if rank == 0 and (self._awaits > asked or not self._is_said):
                asked = self._awaits
                self.need(self._position)

        try:
            with Prefetch(tables, waiting) as ahead:
                for first_step, table in ahead:
                    self._waits = ahead.waits
                    if rank == 0:
                        self.need(first_step * batch_size)
                    yield from sequences_of(table)
        finally:
            closed.set()

    def epoch_at(self, position: int) -> float:
        """Passes over the data after a position that was reached."""
        ends = self._ends_up_to(position)
        number = bisect_right(ends, position - 1) if position else 0
        start = ends[number - 1] if number else 0
        size = ends[number] - start if number < len(ends) else 1
        assert self._prepared.manifest.windows is not None
        return round((number + (position - start) / size) / self._prepared.manifest.windows, 4)

    def rows_at(self, start: int, stop: int) -> dict[str, list[int]]:
        """Source rows of the sequences at positions [start, stop), by file; without those of
        windows that are deleted."""
        places: dict[str, set[int]] = {}
        ends = self._ends_up_to(stop)
        for number in range(bisect_right(ends, start), len(ends)):
            begins = ends[number - 1] if number else 0
            opened = self._open(number, ends) if begins < stop else None
            if opened is None:
                continue
            table, _ = self._read(opened, lambda at: (at >= start) & (at < stop))
            numbers = {row for rows in table["rows"].to_pylist() for row in rows}
            for file, line in _origins(sorted(numbers), opened.manifest):
                places.setdefault(file, set()).add(line)
        return {file: sorted(lines) for file, lines in places.items()}

    def _tables(
        self, batch_size: int, worker: tuple[int, int], steps: tuple[int, int], closed: Event
    ) -> Iterator[tuple[int, pa.Table]]:
        """(first step, a worker's rows of it and of some steps that follow it), in order."""
        rank, world_size = worker
        position, stop = steps[0] * batch_size, steps[1] * batch_size
        complete, tries = position, 0
        held: list[pa.Table] = []
        while position < stop:
            opened = self._awaited(position, closed)
            if opened is None:
                return
            end = min(stop, opened.end)
            try:
                own = _Own(position, end, batch_size, rank, world_size)
                table, places = self._read(opened, own)
            except DamagedDataError:
                tries += 1
                if opened.number == 0 or tries >= _TRIES:
                    raise
                self._folder.delete(f"{window_name(opened.number)}/{MANIFEST}")
                continue
            position, tries = end, 0
            # Other rows of the last step before `end` are in the next window.
            whole = end if end == stop else end // batch_size * batch_size
            cut = int(np.searchsorted(places, whole))
            held.append(table.slice(0, cut))
            if whole > complete:
                yield complete // batch_size, pa.concat_tables(held)
                complete, held = whole, []
            held.append(table.slice(cut))

    def _awaited(self, position: int, closed: Event) -> "_Opened | None":
        """The window that holds a position, once it exists; None if nobody needs it any more.

        Raises:
            InputError: the driver cannot prepare the data.
            RunError: it does not answer, or its storage is full.
        """
        quiet, since = 0.0, time.monotonic()
        while True:
            ends = self._ends_up_to(position + 1)
            number = bisect_right(ends, position)
            opened = self._open(number, ends) if number < len(ends) else None
            if opened is not None:
                return opened
            self._awaits = number
            self._refuse_failed()
            sign = read_json(self._folder, SIGNS)
            now = time.monotonic()
            # The time for which this process itself was stopped does not count.
            quiet = quiet + min(now - since, 2 * self._poll) if sign == self._sign else 0.0
            self._looks += 1
            self._sign, since = sign, now
            if quiet > self._patience:
                raise RunError(
                    f"{self._folder}: window {number} of the data is missing, and for "
                    f"{self._patience:g} s nothing has been prepared: the driver is gone, or its "
                    "storage is full; start the run again, which resumes it"
                )
            if closed.wait(self._poll):
                return None

    def _refuse_failed(self) -> None:
        failed = read_json(self._folder, FAILED)
        if failed is not None:
            kind = InputError if failed["exit_code"] == InputError.exit_code else RunError
            raise kind(failed["error"])

    def _ends_up_to(self, position: int) -> list[int]:
        """The end of each window that was made; looked up again if none reaches the position."""
        if not self._ends or self._ends[-1] < position:
            counts = read_counts(self._folder)
            first = [self._prepared.manifest.train.sequences]
            self._ends = first if counts is None else counts.ends
        return self._ends

    def _open(self, number: int, ends: list[int]) -> "_Opened | None":
        """A window; None if it does not exist."""
        if number == 0:
            prepared: Prepared | None = self._prepared
        else:
            try:
                prepared = open_prepared(self._folder / window_name(number))
            except DamagedDataError:  # it is being deleted, or will be made again
                self._folder.delete(f"{window_name(number)}/{MANIFEST}")
                return None
        if prepared is None:
            return None
        start = ends[number - 1] if number else 0
        return _Opened(number, start, prepared.files, prepared.manifest)

    def _read(
        self, opened: "_Opened", chosen: Callable[[Positions], Mask]
    ) -> tuple[pa.Table, Positions]:
        """Sequences of a window in the order of their positions, and these: those chosen."""
        split = opened.manifest.train
        groups = tuple(
            (file, group)
            for file, sizes in enumerate(split.row_groups)
            for group in range(len(sizes))
        )
        window = Window(opened.number, 0, opened.start, groups, split.sequences)
        order = window_order(window, self._seed)
        positions = opened.start + np.arange(split.sequences)
        mask = chosen(positions)
        table = read_groups(opened.files, split, window).take(pa.array(order[mask]))
        return table, positions[mask]


@dataclass(frozen=True)
class _Own:
    """Chooses a worker's positions in [first, last)."""

    first: int
    last: int
    batch_size: int
    rank: int
    world_size: int

    def __call__(self, positions: Positions) -> Mask:
        own: Mask = (positions >= self.first) & (positions < self.last)
        own &= owner(positions % self.batch_size, self.batch_size, self.world_size) == self.rank
        return own


def _origins(numbers: list[int], manifest: Manifest) -> Iterator[tuple[str, int]]:
    """(file, row in it) of rows of a window; both ascend."""
    first = 0
    for chunk, rows in manifest.blocks:
        inside = [number - first for number in numbers if first <= number < first + rows]
        first += rows
        if not inside:
            continue
        file = SourceFile(**{**chunk["file"], "rows": None})
        block = Chunk(**{**chunk, "file": file})
        before = 0 if block.rows is None else block.rows[0]
        start = place_in_file(block, 1 + before)
        yield from ((file.uri, start + number) for number in inside)
