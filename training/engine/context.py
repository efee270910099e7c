"""The interface between a worker and its launcher: rank, stop request, heartbeat."""

import threading
from contextlib import suppress
from typing import Protocol

from ..common.storage import Folder
from .heartbeat import Heartbeat

STOP_FILE = "stop"
"""In a folder of a run or sweep: a request to save and end, for workers on any node."""
_POLL_SECONDS = 1.0


class WorkerContext(Protocol):
    """One worker's view of the run; each launcher has its own."""

    rank: int
    world_size: int
    on_ray: bool
    nodes: tuple[str, ...]
    """Ray's ids of the nodes that train, by rank."""
    heartbeat: Heartbeat
    """Receives the worker's phases; whoever reads it ends a worker that hangs."""

    def stop_requested(self) -> bool:
        """True if the run should save and end."""


def watch_stop_file(folder: Folder) -> threading.Event:
    """An event that is set once the folder holds a stop file."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            with suppress(OSError):  # the storage is unavailable for a moment: try again
                if folder.exists(STOP_FILE):
                    stop.set()

    threading.Thread(target=watch, name="stop-file", daemon=True).start()
    return stop
