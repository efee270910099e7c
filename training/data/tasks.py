"""Runs the tasks of a preparation, in this process or on Ray Data."""

import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from ..common.errors import FinrayError, InputError, RunError, in_one_line
from ..common.logs import limit
from ..config.sections import PrepareSettings

_HANDED_ON = (FinrayError, OSError)
"""Errors of a task that are raised in the driver as they are."""

_TASKS_BESIDE = 8
"""Tasks that prepare data at the same time while workers train."""
_AHEAD = 2
"""Items that an actor holds: the one that it works at, and the next."""
_OWN_RESOURCE = re.compile(r"(CPU|GPU|memory|object_store_memory)$|node:|accelerator_type:")

T = TypeVar("T")
R = TypeVar("R")


class RunTasks(Protocol):
    """A function that applies a task to items, and yields the results in the same order."""

    def __call__(
        self, task: Callable[[T], R], items: Sequence[T], on_gpus: bool = False
    ) -> Iterator[R]: ...


def run_in_process(
    task: Callable[[T], R], items: Sequence[T], on_gpus: bool = False
) -> Iterator[R]:
    """Run the task for one item after the other, in this thread."""
    del on_gpus  # it uses this process's own
    return map(task, items)


@dataclass(frozen=True)
class RunOnRayData:
    """Runs each item in a Ray Data task, anywhere in the cluster; Ray must be initialised.

    Task, items and results are pickled; tasks write large output to storage themselves.

    Args:
        cpus: most CPU cores that work at once; None for all.
        resources: custom resources that each task asks for.
        beside: run that many tasks at once, which hold no CPU: workers that train may hold all.
        actors: work in as many processes at most, each with a GPU where there are some, and each of
            which keeps what the task loads; None for all GPUs, and for tasks where there are none.
        in_order: yield the results in the items' order, and not as they are ready.
    """

    cpus: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    beside: int | None = None
    actors: int | None = None
    in_order: bool = True

    @classmethod
    def within(cls, bounds: PrepareSettings | None) -> "RunOnRayData":
        """Tasks within the bounds of a recipe."""
        return cls() if bounds is None else cls(bounds.cpus, bounds.resources)

    @classmethod
    def beside_workers(cls, bounds: PrepareSettings | None) -> "RunOnRayData":
        """A few tasks within the bounds of a recipe, while workers hold their CPUs."""
        cpus, resources = (None, {}) if bounds is None else (bounds.cpus, bounds.resources)
        return cls(resources=resources, beside=min(_TASKS_BESIDE, cpus or _TASKS_BESIDE))

    @property
    def gpus(self) -> int:
        """GPUs of the cluster."""
        import ray

        return int(ray.cluster_resources().get("GPU", 0))

    def __call__(
        self, task: Callable[[T], R], items: Sequence[T], on_gpus: bool = False
    ) -> Iterator[R]:
        """Yield the results, in the items' order if `in_order`.

        Args:
            task: what is done with an item.
            items: the items.
            on_gpus: work in actors with a GPU each; where there are none, in tasks as usual.

        Raises:
            FinrayError: a task raised it.
            InputError: no node has the custom resources.
            OSError: a task could not write.
            RunError: a task failed in another way.
        """
        if not items:
            return
        import ray.data
        import ray.exceptions

        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = self.in_order
        context.execution_options.verbose_progress = False
        with ray.data.DataContext.current(context), _only_errors("ray.data"):
            rows = ray.data.from_items(
                [{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items)
            )
            results = self._results(rows, task, on_gpus, len(items))
            batches = results.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
            try:
                for batch in batches:
                    outcome = pickle.loads(batch["result"][0].as_py())
                    if isinstance(outcome, _HANDED_ON):
                        raise outcome
                    yield outcome
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"a data task failed: {in_one_line(error)}; run the same command again, with "
                    "--verbose to see what the workers print"
                ) from error

    def _results(self, rows: Any, task: Callable[[T], R], on_gpus: bool, count: int) -> Any:
        import ray
        from ray.data import ActorPoolStrategy, TaskPoolStrategy

        options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
        gpus = self.gpus if on_gpus else 0
        if gpus or self.actors is not None:
            size = min(count, gpus or count, self.actors or count)
            # Not more at once than an actor needs to stay busy: a kill loses what is in flight.
            actors = ActorPoolStrategy(
                min_size=1,
                max_size=size,
                initial_size=size,
                max_tasks_in_flight_per_actor=_AHEAD,
            )
            options |= {"compute": actors, "fn_constructor_args": (task,)}
            options |= {"num_gpus": 1} if gpus else {"num_cpus": 1}
            return rows.map_batches(_Call, **options)
        if self.resources:
            _check_exist(self.resources, [node["Resources"] for node in ray.nodes()])
            options["resources"] = dict(self.resources)
        if self.beside is not None:
            options |= {"compute": TaskPoolStrategy(size=min(count, self.beside)), "num_cpus": 0}
        elif self.cpus is not None:
            options["compute"] = TaskPoolStrategy(size=min(count, self.cpus))
        return rows.map_batches(_Call(task), **options)


def _check_exist(resources: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse custom resources that no node has: Ray would wait for one for ever."""
    if any(all(node.get(name, 0.0) >= n for name, n in resources.items()) for node in nodes):
        return
    asked = ", ".join(f"{name}: {n:g}" for name, n in resources.items())
    custom = {name for node in nodes for name in node if not _OWN_RESOURCE.match(name)}
    raise InputError(
        f"scale.prepare.resources: no node has {{{asked}}}; the nodes' custom resources are: "
        f"{', '.join(sorted(custom)) or 'none'}; start those that prepare with it (ray start "
        "--resources), or remove it"
    )


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
