"""Trains in this process, without Ray."""

from ..common.background import Stop
from ..common.imports import uncollected
from ..common.progress import Progress
from ..common.storage import Folder
from ..engine.guard import guarded
from ..engine.heartbeat import Heartbeat
from ..engine.task import Report, WorkerResult, WorkerTask
from ..models.base_cache import BaseCache
from ..models.devices import Room
from .retries import Launcher


class InProcessContext:
    """The only worker of a run, in the driver's process.

    Args:
        stop: requested when the run should save and end.
        heartbeat: receives the worker's phases.
    """

    rank = 0
    world_size = 1
    on_ray = False
    nodes: tuple[str, ...] = ()

    def __init__(self, stop: Stop, heartbeat: Heartbeat) -> None:
        self._stop = stop
        self.heartbeat = heartbeat

    def stop_requested(self) -> bool:
        """True after Ctrl-C or SIGTERM."""
        return self._stop.requested.is_set()


class InProcessLauncher(Launcher):
    """Trains in this process; an error ends the run, as no other process is left to retry it.

    Args:
        stop: requested when the run should save and end.
        report: receives measures while the run trains (see `Report`).
        bases: keeps the frozen base for the next run of this process; None keeps nothing.
        room: what this process's GPU offers; None without one.
    """

    max_failures = 0

    def __init__(
        self,
        stop: Stop | None = None,
        report: Report | None = None,
        bases: BaseCache | None = None,
        room: Room | None = None,
    ) -> None:
        self.room = room
        self.stop = stop or Stop()
        self._report = report
        self._bases = bases

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train until the run ends."""
        with uncollected():
            from ..engine.worker import run_worker
        from ..models.devices import on_cpu
        from ..models.dtypes import free_memory

        scale = task["recipe"]["scale"]
        timeout, no_gpu = scale["hang_timeout"], scale["gpus_per_worker"] == 0
        guard = guarded(Folder(task["run"]), 0, timeout, in_process=True)
        with on_cpu(no_gpu), guard as heartbeat:
            context = InProcessContext(self.stop, heartbeat)
            result = run_worker(task, context, self._report, self._bases)
        if result["status"] == "retry":
            free_memory()
        return result

    def wait_until_ready(self, progress: Progress) -> None:
        """No-op: this machine is always ready."""
