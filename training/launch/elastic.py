"""A run's workers on a cluster that changes: how many, and when to start anew.

    how many fit now → train → a worker fails, nodes leave or come → how many fit now → …

Every attempt is a Ray Train worker group of a fixed size that resumes from the newest good
checkpoint. Ray Train's own elastic groups count nodes that are being drained, and give up the
steps since the last checkpoint whenever they grow; here the workers save first.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..common.errors import InputError, RunError
from ..common.stop import Stop
from ..common.storage import Folder
from ..records import checkpoint
from ..records.run_folder import read_run
from .resources import (
    Demand,
    ask_autoscaler,
    check_fits,
    cluster_nodes,
    draining_nodes,
    fitting_workers,
)

_LOOK_SECONDS = 2.0
_GROW_SECONDS = 20.0
"""Room for more workers is taken once it lasts so long: nodes rarely come alone."""


@dataclass
class Patience:
    """How many failures without progress a run bears.

    Args:
        checkpoints: where progress shows.
        limit: failures in a row without a new checkpoint between them.
    """

    checkpoints: Folder
    limit: int
    _failures: int = 0
    _newest: str | None = None

    def bears(self) -> bool:
        """Count a failure; whether another attempt is to be made."""
        try:
            newest = checkpoint.newest(self.checkpoints)
        except OSError:  # a storage that is away shows no progress
            newest = self._newest
        self._failures = self._failures + 1 if newest == self._newest else 1
        self._newest = newest
        return self._failures <= self.limit


class Watch:
    """Looks at the cluster while an attempt trains: is there a reason to save and start anew?

    Args:
        run: the run's folder; its run.json names the nodes that train.
        wanted: the run's demand.
        workers: those of this attempt.
    """

    def __init__(self, run: Folder, wanted: Demand, workers: int) -> None:
        self._run = run
        self._wanted = wanted
        self._workers = workers
        self._next = time.monotonic() + _LOOK_SECONDS
        self._room_since: float | None = None
        self.reason: str | None = None
        """Why the attempt should end; None while it should not."""

    def sees_reason(self) -> bool:
        """Whether the attempt should end; cheap enough to be asked all the time."""
        now = time.monotonic()
        if self.reason is None and now >= self._next:
            self._next = now + _LOOK_SECONDS
            self.reason = self._loss() or self._growth(now)
        return self.reason is not None

    def _loss(self) -> str | None:
        leaving = draining_nodes()
        if not leaving:
            return None
        try:
            mine = leaving & set((read_run(self._run) or {}).get("nodes", ()))
        except OSError:
            return None  # a storage that is away for a moment: the next look tells
        return f"{len(mine)} of the run's nodes will be taken away" if mine else None

    def _growth(self, now: float) -> str | None:
        room = self._room() if self._workers < self._wanted.most else 0
        if room <= self._workers:
            self._room_since = None
            return None
        self._room_since = self._room_since or now
        if now - self._room_since < _GROW_SECONDS:
            return None
        return f"there is room for {room} workers, {self._workers} train"

    def _room(self) -> int:
        """With the workers that train already; others' work on the cluster stays."""
        import ray

        free = ray.available_resources()
        more = min(free.get(kind, 0.0) // amount for kind, amount in self._wanted.worker.items())
        most = min(self._wanted.most, fitting_workers(self._wanted, cluster_nodes()))
        return min(self._workers + int(more), most)


def await_room(
    wanted: Demand, seconds: float, stop: Stop, tell: Callable[[str], None]
) -> int | None:
    """Wait until the cluster holds the workers again; returns how many, None at a stop.

    Raises:
        RunError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    asked = False
    while not stop.requested.is_set():
        try:
            return check_fits(wanted, cluster_nodes())
        except InputError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{error}. The run waited {seconds:g} s (scale.node_wait); the same command "
                    "goes on from its last checkpoint"
                ) from None
            if not asked:
                asked = True
                ask_autoscaler(wanted)
                tell(f"waiting up to {seconds:g} s for nodes: {error}")
        stop.requested.wait(_LOOK_SECONDS)
    return None
