"""Trains in this process, without Ray."""

from typing import NoReturn

from ..common.background import Stop
from ..common.progress import Progress
from ..common.storage import Folder
from ..engine.context import end_process
from ..engine.task import Report, WorkerResult, WorkerTask
from ..models.base_cache import BaseCache
from ..records.recorder import now, update_run
from .retries import Launcher


class InProcessContext:
    """The only worker of a run, in the driver's process.

    Args:
        run: the run's folder.
        stop: requested when the run should save and end.
    """

    rank = 0
    world_size = 1
    on_ray = False
    nodes: tuple[str, ...] = ()

    def __init__(self, run: Folder, stop: Stop) -> None:
        self._run = run
        self._stop = stop

    def stop_requested(self) -> bool:
        """True after Ctrl-C or SIGTERM."""
        return self._stop.requested.is_set()

    def abort(self, message: str) -> NoReturn:
        """Record the failure, as there is no other process to do it, and end this one."""
        failed = {"status": "failed", "error": message, "finished_at": now()}
        update_run(self._run, lambda record: record.update(failed))
        end_process(message)


class InProcessLauncher(Launcher):
    """Trains in this process; an error ends the run, as no other process is left to retry it.

    Args:
        stop: requested when the run should save and end.
        report: receives measures while the run trains (see `Report`).
        bases: keeps the frozen base for the next run of this process; None keeps nothing.
    """

    max_failures = 0

    def __init__(
        self,
        stop: Stop | None = None,
        report: Report | None = None,
        bases: BaseCache | None = None,
    ) -> None:
        self.stop = stop or Stop()
        self._report = report
        self._bases = bases

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train until the run ends."""
        from ..engine.worker import run_worker
        from ..models.dtypes import free_memory

        context = InProcessContext(Folder(task["run"]), self.stop)
        result = run_worker(task, context, self._report, self._bases)
        if result["status"] == "retry":
            free_memory()
        return result

    def wait_until_ready(self, progress: Progress) -> None:
        """No-op: this machine is always ready."""
