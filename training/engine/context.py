"""The interface between a worker and its launcher: rank, stop request, abort."""

import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn, Protocol

from ..common.errors import RunError
from ..common.storage import Folder

STOP_FILE = "stop"
"""In a folder of a run or sweep: a request to save and end, for workers on any node."""
STACKS_SECONDS = 3.0
"""Delay before a hanging worker ends, in which the other ranks write their stacks."""
_POLL_SECONDS = 1.0


class WorkerContext(Protocol):
    """One worker's view of the run; each launcher has its own."""

    rank: int
    world_size: int
    on_ray: bool
    nodes: tuple[str, ...]
    """Ray's ids of the nodes that train, by rank."""

    def stop_requested(self) -> bool:
        """True if the run should save and end."""

    def abort(self, message: str) -> NoReturn:
        """End this process, whose training hangs. Called from another thread."""


def end_process(message: str) -> NoReturn:
    """End this process at once, as its threads may hang; its children are left to its parent."""
    print(f"finray: {message}", file=sys.stderr, flush=True)
    os._exit(RunError.exit_code)


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
