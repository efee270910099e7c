"""Decides on a changing cluster how many workers train, and when to restart them.

    how many fit now → train → a worker fails, nodes leave or join → how many fit now → …

Every attempt is a Ray Train worker group of a fixed size that resumes from the newest good
checkpoint. Ray Train's own elastic groups count draining nodes, and lose the steps since the last
checkpoint whenever they grow; here the workers save first.
"""

import time

from ..common.background import Stop
from ..common.errors import InputError, RunError
from ..common.progress import Progress
from ..common.storage import Folder
from ..records.run_folder import read_run
from .resources import (
    WorkerRequest,
    check_fits,
    cluster_nodes,
    draining_nodes,
    fitting_workers,
    request_from_autoscaler,
)

_POLL_SECONDS = 2.0
_GROW_SECONDS = 20.0
"""Capacity for more workers is used once it lasts this long, as nodes often join in groups."""


class ClusterWatcher:
    """Watches the cluster during an attempt for a reason to save and restart.

    Args:
        run: the run's folder; its run.json names the nodes that train.
        request: the run's workers.
        workers: number of this attempt's workers.
    """

    def __init__(self, run: Folder, request: WorkerRequest, workers: int) -> None:
        self._run = run
        self._request = request
        self._workers = workers
        self._next_poll = time.monotonic() + _POLL_SECONDS
        self._capacity_since: float | None = None
        self.reason: str | None = None
        """Why the attempt should end; None while it should not."""

    def has_reason(self) -> bool:
        """True if the attempt should end; cheap enough to call all the time."""
        now = time.monotonic()
        if self.reason is None and now >= self._next_poll:
            self._next_poll = now + _POLL_SECONDS
            self.reason = self._leaving_nodes() or self._growth(now)
        return self.reason is not None

    def _leaving_nodes(self) -> str | None:
        leaving = draining_nodes()
        if not leaving:
            return None
        try:
            training = leaving & set((read_run(self._run) or {}).get("nodes", ()))
        except OSError:
            return None  # the storage is unavailable for a moment: the next poll reads it
        return f"{len(training)} of the run's nodes are being removed" if training else None

    def _growth(self, now: float) -> str | None:
        capacity = self._capacity() if self._workers < self._request.max else 0
        if capacity <= self._workers:
            self._capacity_since = None
            return None
        self._capacity_since = self._capacity_since or now
        if now - self._capacity_since < _GROW_SECONDS:
            return None
        return f"there is room for {capacity} workers, {self._workers} train"

    def _capacity(self) -> int:
        """Number of workers that fit: those that train, and those that fit next to other jobs."""
        import ray

        free = ray.available_resources()
        per_worker = self._request.worker.items()
        more = min(free.get(kind, 0.0) // amount for kind, amount in per_worker)
        fits = fitting_workers(self._request, cluster_nodes())
        return min(self._workers + int(more), self._request.max, fits)


def wait_for_capacity(
    request: WorkerRequest, seconds: float, stop: Stop, progress: Progress
) -> int | None:
    """Wait until the workers fit into the cluster.

    Returns:
        How many workers fit; None if a stop is requested before.

    Raises:
        RunError: they do not fit within `seconds`.
    """
    deadline = time.monotonic() + seconds
    is_waiting = False
    while not stop.requested.is_set():
        try:
            return check_fits(request, cluster_nodes())
        except InputError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{error}. The run waited {seconds:g} s (scale.node_wait); the same command "
                    "resumes it from its last checkpoint"
                ) from None
            if not is_waiting:
                is_waiting = True
                request_from_autoscaler(request)
                progress.status(f"waiting up to {seconds:g} s for nodes: {error}")
        stop.requested.wait(_POLL_SECONDS)
    return None
