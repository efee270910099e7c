"""The order in which prepared sequences are used for training, and each worker's slice of it.

The order is a pure function of (prepared data, seed, epoch). Global position p is the same
sequence for any number of workers: step s uses positions [s*B, (s+1)*B) for batch size B, and
each worker a contiguous part of them. A stream that starts at position p therefore yields exactly
the sequences that any other stream yields from there.

An epoch shuffles the row groups of the Parquet files, joins WINDOW_GROUPS of them at a time to a
window, and shuffles the rows inside each window. So the data is well shuffled, and still read in
whole row groups.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..common.logs import limit
from ..common.storage import Folder
from .prefetch import Prefetch
from .prepared import DamagedDataError, Split, check_file, forget_checks

WINDOW_GROUPS = 32
_CONCURRENT_TASKS = 2
"""Maximum number of windows that Ray Data reads for a worker at the same time."""
_DAMAGE = "damage"
"""The only column of what a Ray Data task returns for damaged data: the message."""
COLUMNS = ("input_ids", "lengths", "trainable", "rows", "extra")


@dataclass(frozen=True)
class Sequence:
    """One training row: a document, several packed documents, or the two texts of a pair."""

    input_ids: NDArray[np.int32]
    """Shape (tokens,)."""
    lengths: NDArray[np.int32]
    """Tokens of each document (or text); their sum is the length of `input_ids`."""
    trainable: NDArray[np.bool_]
    """Shape (tokens,): True for tokens that the loss counts."""
    rows: NDArray[np.int64]
    """The documents' row numbers in the source data."""
    extra: str | None = None
    """Further input of the method from this row, as JSON; None if there is none."""


@dataclass(frozen=True)
class Window:
    """Row groups of one epoch that are read and shuffled together."""

    epoch: int
    index: int
    start: int
    """Global position of the window's first sequence."""
    groups: tuple[tuple[int, int], ...]
    """(file, row group) pairs, in reading order."""
    size: int


@dataclass(frozen=True)
class Slice:
    """One worker's part of the stream, for steps in [start_step, stop_step)."""

    folder: Folder
    """The attempt folder that holds the split's files."""
    split: Split
    seed: int
    batch_size: int
    rank: int
    world_size: int
    start_step: int
    stop_step: int

    def windows(self) -> Iterator[Window]:
        """The windows that contain positions of these steps, in order."""
        first, last = self.start_step * self.batch_size, self.stop_step * self.batch_size
        epoch = first // self.split.sequences
        while epoch * self.split.sequences < last:
            for window in epoch_windows(self.split, self.seed, epoch):
                if window.start < last and window.start + window.size > first:
                    yield window
            epoch += 1

    def read(self, window: Window) -> pa.Table:
        """This worker's rows of a window, in the order of their positions."""
        first, last = self.start_step * self.batch_size, self.stop_step * self.batch_size
        order = window_order(window, self.seed)
        positions = window.start + np.arange(window.size)
        own = (positions >= first) & (positions < last)
        own &= owner(positions % self.batch_size, self.batch_size, self.world_size) == self.rank
        table = read_groups(self.folder, self.split, window)
        return table.take(pa.array(order[own]))


@lru_cache(maxsize=4)
def epoch_windows(split: Split, seed: int, epoch: int) -> tuple[Window, ...]:
    """The windows of an epoch; their sizes add up to the split's sequences."""
    groups = [
        (file, group, rows)
        for file, sizes in enumerate(split.row_groups)
        for group, rows in enumerate(sizes)
    ]
    shuffled = np.random.default_rng((seed, epoch)).permutation(len(groups))
    windows: list[Window] = []
    start = epoch * split.sequences
    for index, first in enumerate(range(0, len(groups), WINDOW_GROUPS)):
        chosen = [groups[i] for i in shuffled[first : first + WINDOW_GROUPS]]
        size = sum(rows for _, _, rows in chosen)
        pairs = tuple((file, group) for file, group, _ in chosen)
        windows.append(Window(epoch, index, start, pairs, size))
        start += size
    return tuple(windows)


def window_order(window: Window, seed: int) -> NDArray[np.int64]:
    """Row numbers of a window (as read), in the order of their positions."""
    return np.random.default_rng((seed, window.epoch, window.index)).permutation(window.size)


def owner(places: NDArray[np.int64], batch_size: int, world_size: int) -> NDArray[np.int64]:
    """The rank that trains on each place (0 ≤ place < batch_size) of a batch.

    Each rank has a contiguous part; the sizes of the parts differ by at most one sequence.
    """
    counts = [share(batch_size, rank, world_size) for rank in range(world_size)]
    owners: NDArray[np.int64] = np.repeat(np.arange(world_size), counts)[places]
    return owners


def share(batch_size: int, rank: int, world_size: int) -> int:
    """Number of sequences of each global batch that a rank trains on."""
    return batch_size // world_size + (1 if rank < batch_size % world_size else 0)


def read_groups(folder: Folder, split: Split, window: Window) -> pa.Table:
    """Read row groups; files that this process reads for the first time are checked before.

    Raises:
        DamagedDataError: a file is missing or damaged.
    """
    return pa.concat_tables(
        [_read_group(folder, split.files[file], split.hashes[file], n) for file, n in window.groups]
    )


def _read_group(folder: Folder, name: str, content_hash: str, group: int) -> pa.Table:
    try:
        check_file(folder, name, content_hash)
        with pq.ParquetFile(folder.file(name), filesystem=folder.filesystem) as parquet:
            return parquet.read_row_group(group, columns=list(COLUMNS))
    except (OSError, pa.ArrowInvalid) as error:
        forget_checks()
        raise DamagedDataError(f"{folder}/{name}: cannot be read: {error}") from None


def stream(part: Slice, on_ray: bool) -> Iterator[Sequence]:
    """The sequences of a slice in order, read before they are needed.

    Args:
        part: the slice.
        on_ray: read in Ray Data tasks anywhere in the cluster; otherwise in a thread.
    """
    tables = _read_on_ray(part) if on_ray else map(part.read, part.windows())
    with Prefetch(tables) as ahead:
        for table in ahead:
            yield from sequences_of(table)


def every_sequence(folder: Folder, split: Split, rank: int, world_size: int) -> Iterator[Sequence]:
    """The sequences of a split in stored order; each belongs to exactly one of the workers."""
    start = 0
    for file, sizes in enumerate(split.row_groups):
        for group, size in enumerate(sizes):
            window = Window(0, 0, start, ((file, group),), size)
            own = np.arange((rank - start) % world_size, size, world_size)
            start += size
            if own.size:
                yield from sequences_of(read_groups(folder, split, window).take(pa.array(own)))


def _read_on_ray(part: Slice) -> Iterator[pa.Table]:
    """Read the first window in this process while Ray Data starts to read the others."""
    windows = list(part.windows())
    if len(windows) < 2:
        yield from map(part.read, windows)
        return
    later = _in_ray_tasks(part, windows[1:])
    with ThreadPoolExecutor(1, "ray-data") as pool:
        # None: this worker has no row in any other window.
        ahead = pool.submit(next, later, None)
        yield part.read(windows[0])
        second = ahead.result()
    if second is not None:
        yield second
        yield from later


def _in_ray_tasks(part: Slice, windows: list[Window]) -> Iterator[pa.Table]:
    """Read each window in a Ray Data task; yields them in order, and prefetches the next ones."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    # A long pause of the consumer is normal, because training steps take long.
    context.execution_no_progress_timeout_s = -1
    context.issue_detectors_config.detectors = []
    limit("ray.data", logging.WARNING)
    rows = ray.data.from_items(
        [{"window": index} for index in range(len(windows))],
        override_num_blocks=len(windows),
    ).map_batches(
        _WindowTask(part, windows),
        batch_size=1,
        batch_format="pyarrow",
        # No CPU, or the tasks would never start if the workers hold all CPUs.
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=min(_CONCURRENT_TASKS, len(windows))),
    )
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        if _DAMAGE in table.column_names:
            raise DamagedDataError(table[_DAMAGE][0].as_py())
        yield table


class _WindowTask:
    """Reads the window whose index is in the batch."""

    def __init__(self, part: Slice, windows: list[Window]) -> None:
        self._part = part
        self._windows = windows

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            return self._part.read(self._windows[batch["window"][0].as_py()])
        except DamagedDataError as error:
            # Returned, because Ray would wrap a raised error in its own.
            return pa.table({_DAMAGE: [str(error)]})


def sequences_of(table: pa.Table) -> Iterator[Sequence]:
    """The rows of a table of sequences."""
    columns: list[Any] = [table[name].combine_chunks() for name in COLUMNS]
    for row in range(table.num_rows):
        ids, lengths, trainable, rows = (column[row].values for column in columns[:-1])
        yield Sequence(
            ids.to_numpy(),
            lengths.to_numpy(),
            trainable.to_numpy(zero_copy_only=False),
            rows.to_numpy(),
            columns[-1][row].as_py(),
        )
