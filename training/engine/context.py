"""What a worker knows of its surroundings: its rank, whom to tell, when to stop.

Three backings of one small interface: this process alone, one of several processes of this
machine, and a Ray Train worker.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

from ..common.errors import RunError
from ..common.storage import Folder
from ..records.recorder import now, update_run

STOP_FILE = "stop"
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 3.0
"""For the other ranks' stacks: with the first process that ends, all are ended."""


class Session(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int
    on_ray: bool
    nodes: tuple[str, ...]
    """Ray's ids of the nodes that train, by rank."""

    def report(self, measures: dict[str, float]) -> None:
        """Tell whoever follows the run what was measured; rank 0 does, with `step`, `tokens`."""

    def stop_requested(self) -> bool:
        """Whether the run should save and end."""

    def abandon(self, told: str) -> NoReturn:
        """End this process, whose training hangs, from another thread."""


class LocalSession:
    """The run in this process.

    Args:
        run: the run's folder.
        stop: set when somebody asks the run to stop.
    """

    rank = 0
    world_size = 1
    on_ray = False
    nodes: tuple[str, ...] = ()

    def __init__(self, run: Folder, stop: threading.Event) -> None:
        self._run = run
        self._stop = stop

    def report(self, measures: dict[str, float]) -> None:
        """Nobody follows but the run's folder."""

    def stop_requested(self) -> bool:
        """Whether Ctrl-C or SIGTERM came."""
        return self._stop.is_set()

    def abandon(self, told: str) -> NoReturn:
        """The run has failed, and there is nobody else to write that down."""
        failed = {"status": "failed", "error": told, "finished_at": now()}
        update_run(self._run, lambda record: record.update(failed))
        _end_process(told)


class ProcessSession:
    """One of the run's processes on this machine.

    Args:
        rank: its own.
        world_size: how many there are.
        stop: set when the driver asks the run to stop.
        tell: tells the driver why this process gives up.
    """

    on_ray = False
    nodes: tuple[str, ...] = ()

    def __init__(
        self, rank: int, world_size: int, stop: threading.Event, tell: Callable[[str], None]
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._stop = stop
        self._tell = tell

    def report(self, measures: dict[str, float]) -> None:
        """Nobody follows but the run's folder."""

    def stop_requested(self) -> bool:
        """Whether the driver asked for it."""
        return self._stop.is_set()

    def abandon(self, told: str) -> NoReturn:
        """The driver starts the workers anew from the last checkpoint."""
        time.sleep(_GRACE_SECONDS)
        self._tell(told)
        _end_process(told)


class RaySession:
    """One Ray Train worker of the run."""

    on_ray = True

    def __init__(self, run: Folder) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.nodes = _node_of_each_rank(self.world_size)
        self._stop = watch_stop_file(run) if self.rank == 0 else threading.Event()

    def report(self, measures: dict[str, float]) -> None:
        """Nobody follows but the run's folder: Ray Train's own report is a barrier."""

    def stop_requested(self) -> bool:
        """Whether the driver left a stop file (seen by rank 0, which tells the others)."""
        return self._stop.is_set()

    def abandon(self, told: str) -> NoReturn:
        """The driver starts the workers anew from the last checkpoint."""
        time.sleep(_GRACE_SECONDS)
        _end_process(told)


def _end_process(told: str) -> NoReturn:
    print(f"finray: {told}", file=sys.stderr, flush=True)
    os._exit(RunError.exit_code)


def _node_of_each_rank(world_size: int) -> tuple[str, ...]:
    import ray
    import torch.distributed as dist

    found = [ray.get_runtime_context().get_node_id()] * world_size
    if world_size > 1:
        dist.all_gather_object(found, found[0])
    return tuple(found)


def watch_stop_file(run: Folder) -> threading.Event:
    """An event that is set once the folder holds a stop file."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            with suppress(OSError):  # a store that is away for a moment: the next look tells
                if run.exists(STOP_FILE):
                    stop.set()

    threading.Thread(target=watch, name="stop-file", daemon=True).start()
    return stop
