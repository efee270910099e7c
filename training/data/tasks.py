"""Runs the tasks of a preparation, in this process or on Ray Data."""

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from ..common.errors import FinrayError, RunError, in_one_line
from ..common.logs import limit

_HANDED_ON = (FinrayError, OSError)
"""Errors of a task that are raised in the driver as they are."""

_TASKS_BESIDE = 8
"""Tasks that prepare data at the same time while workers train."""

T = TypeVar("T")
R = TypeVar("R")


class RunTasks(Protocol):
    """A function that applies a task to items, and yields the results in the same order."""

    def __call__(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]: ...


def run_in_process(task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Run the task for one item after the other, in this thread."""
    return map(task, items)


def run_beside_workers(task: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """As `run_on_ray_data`, while the workers may hold all CPUs: a few tasks that hold none.

    Raises:
        FinrayError, OSError, RunError: see there.
    """
    return run_on_ray_data(task, items, at_once=_TASKS_BESIDE)


def run_on_ray_data(
    task: Callable[[T], R], items: Sequence[T], at_once: int | None = None
) -> Iterator[R]:
    """Run each item in a Ray Data task, anywhere in the cluster; Ray must be initialised.

    Task, items and results are pickled; tasks write large output to storage themselves.

    Args:
        task: what is done with each item.
        items: the items.
        at_once: run as many tasks that hold no CPU; None: a task for each free CPU.

    Raises:
        FinrayError: a task raised it.
        OSError: a task could not write.
        RunError: a task failed in another way.
    """
    if not items:
        return
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    options: dict[str, Any] = {}
    if at_once is not None:
        pool = ray.data.TaskPoolStrategy(size=min(at_once, len(items)))
        options = {"num_cpus": 0, "compute": pool}
    with ray.data.DataContext.current(context), _only_errors("ray.data"):
        results = ray.data.from_items(
            [{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items)
        ).map_batches(_Call(task), batch_size=1, batch_format="pyarrow", **options)
        batches = results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
        try:
            for batch in batches:
                outcome = pickle.loads(batch["result"][0].as_py())
                if isinstance(outcome, _HANDED_ON):
                    raise outcome
                yield outcome
        except ray.exceptions.RayError as error:
            raise RunError(f"a data task failed: {in_one_line(error)}") from error


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    limit(name, logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Call:
    """A task in the form that Ray Data calls: from a pickled item to a pickled result."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        self._task = task

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            outcome = self._task(pickle.loads(batch["item"][0].as_py()))
        except _HANDED_ON as error:
            # Returned, because Ray would wrap a raised error in its own.
            outcome = error
        return pa.table({"result": pa.array([pickle.dumps(outcome)], pa.large_binary())})
