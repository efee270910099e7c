"""One worker's rows: those of its steps, those held out, and where each of them comes from."""

from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist

from ..common.errors import RunError
from ..common.storage import Folder
from ..config.recipe import Recipe
from ..data.batching import PADDING_ROW, Rows, in_batches
from ..data.microbatches import Division
from ..data.origin import Origins, rows_of_step
from ..data.prepared import ROW_GROUP, Prepared, forget_checks, open_prepared
from ..data.stream import Sequence, Slice, every_sequence, share, stream
from ..data.window_files import WINDOWS_FOLDER
from ..data.window_reader import StreamedWindows
from .context import WorkerContext


class WorkerRows:
    """The rows that this worker reads; the other workers read the rest.

    Args:
        recipe: the run's.
        prepared: its data; of streamed data the first window.
        context: this worker's rank.
        run_folder: where the windows of streamed data are.
    """

    def __init__(
        self, recipe: Recipe, prepared: Prepared, context: WorkerContext, run_folder: Folder
    ) -> None:
        self._recipe = recipe
        self._prepared = prepared
        self._context = context
        self._passes = recipe.method.repeats
        self._windows: StreamedWindows | None = None
        if recipe.data.streams:
            folder = run_folder / WINDOWS_FOLDER
            self._windows = StreamedWindows(folder, prepared, recipe.seed)

    @property
    def are_held_out(self) -> bool:
        """True if some rows are held out."""
        return self._prepared.manifest.eval is not None

    def need(self, step: int) -> None:
        """Ask for the window of the step that follows; once, before the model loads."""
        if self._windows is not None and self._context.rank == 0:
            self._windows.need(step // self._passes * self._recipe.rows_per_step)

    def training(self, done: int, total: int) -> Iterator[Rows]:
        """This worker's rows, a step's at a time.

        Args:
            done: optimizer steps done.
            total: optimizer steps of the run.
        """
        context = self._context
        own = share(self._recipe.rows_per_step, context.rank, context.world_size)
        return in_batches(self._sequences(done // self._passes, -(-total // self._passes)), own)

    def _sequences(self, start: int, stop: int) -> Iterator[Sequence]:
        recipe, context = self._recipe, self._context
        worker = context.rank, context.world_size
        if self._windows is not None:
            beat = context.heartbeat.beat
            return self._windows.rows(recipe.rows_per_step, *worker, (start, stop), beat)
        files, split = self._prepared.files, self._prepared.manifest.train
        part = Slice(files, split, recipe.seed, recipe.rows_per_step, *worker, start, stop)
        return stream(part, on_ray=context.on_ray)

    def held_out(
        self, division: Division, together: bool, group: dist.ProcessGroup | None
    ) -> Iterator[Rows]:
        """This worker's held-out rows, a batch at a time.

        Args:
            division: what shares a batch.
            together: all workers take equally many batches.
            group: of all workers' CPUs; None for a single one.
        """
        split, context = self._prepared.manifest.eval, self._context
        assert split is not None
        sequences = every_sequence(self._prepared.files, split, context.rank, context.world_size)
        batches = division.in_order(sequences)
        for rows in equally_many(batches, group) if together else batches:
            context.heartbeat.beat()
            yield rows

    def origins(self, step: int) -> Origins:
        """The source rows of a step (counted from 1)."""
        if self._windows is None:
            return rows_of_step(self._recipe, self._prepared, step)
        size = self._recipe.rows_per_step
        start = (step - 1) // self._passes * size
        return self._windows.rows_at(start, start + size)

    def epoch_at(self, step: int) -> float:
        """Passes over the training rows after an optimizer step."""
        if self._windows is not None:
            return self._windows.epoch_at(step // self._passes * self._recipe.rows_per_step)
        return self._recipe.epoch_at(step, self._prepared.manifest.train.sequences)

    def hold(self, token: int) -> bool:
        """True if one of the first training rows holds a token."""
        rows = every_sequence(self._prepared.files, self._prepared.manifest.train, 0, 1)
        return any(token in row.input_ids for row in islice(rows, ROW_GROUP))


def open_data(uri: str) -> Prepared:
    """The prepared data set at a URI.

    Raises:
        RunError: it no longer exists.
    """
    forget_checks()  # of an earlier run of this process
    prepared = open_prepared(Folder(uri))
    if prepared is None:
        raise RunError(f"the prepared data set {uri} no longer exists; start the run again")
    return prepared


def equally_many(batches: Iterator[Rows], group: dist.ProcessGroup | None) -> Iterator[Rows]:
    """A rank's batches, and padding while others have some: sharded, all of them compute together.

    Args:
        batches: this rank's.
        group: exchanges, between CPUs, who has one more; None for a single rank.
    """
    while True:
        rows = next(batches, None)
        have_more = torch.tensor(rows is not None, dtype=torch.int)
        if group is not None:
            dist.all_reduce(have_more, dist.ReduceOp.MAX, group=group)
        if not have_more:
            return
        yield rows or [PADDING_ROW]
