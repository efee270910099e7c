"""What a worker knows of its surroundings: its rank, where checkpoints go, when to stop.

Two backings of one small interface: this process alone, and a Ray Train worker.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from . import checkpoint
from .run_folder import CHECKPOINTS_FOLDER
from .storage import Folder

STOP_FILE = "stop"
_POLL_SECONDS = 1.0


class Session(Protocol):
    """One worker's view of the run."""

    rank: int
    world_size: int
    on_ray: bool
    nodes: tuple[str, ...]
    """Ray's ids of the nodes that train, by rank."""

    def commit(self, step: int, staged: Path, metrics: dict[str, float]) -> None:
        """Make a staged checkpoint durable; `staged` is consumed. All ranks take part."""

    def report(self, measures: dict[str, float]) -> None:
        """Tell whoever follows the run what was measured; rank 0 does, with `step`, `tokens`."""

    def stop_requested(self) -> bool:
        """Whether the run should save and end."""


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
        self._checkpoints = run / CHECKPOINTS_FOLDER
        self._stop = stop

    def commit(self, step: int, staged: Path, metrics: dict[str, float]) -> None:
        """Copy the checkpoint into the run's folder."""
        checkpoint.publish(staged, self._checkpoints / checkpoint.checkpoint_name(step), 0)
        shutil.rmtree(staged)

    def report(self, measures: dict[str, float]) -> None:
        """Nobody follows but the run's folder."""

    def stop_requested(self) -> bool:
        """Whether Ctrl-C or SIGTERM came."""
        return self._stop.is_set()


class RaySession:
    """One Ray Train worker of the run."""

    on_ray = True

    def __init__(self, run: Folder) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.nodes = _node_of_each_rank(self.world_size)
        self._checkpoints = run / CHECKPOINTS_FOLDER
        self._stop = watch_stop_file(run) if self.rank == 0 else threading.Event()

    def commit(self, step: int, staged: Path, metrics: dict[str, float]) -> None:
        """Upload this rank's files and report them to Ray Train, a barrier of all ranks."""
        import ray.train

        ray.train.report(
            {"step": step, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(staged),
            checkpoint_dir_name=checkpoint.checkpoint_name(step),
            checkpoint_upload_fn=_uploader(self._checkpoints, self.rank),
            delete_local_checkpoint_after_upload=True,
        )

    def report(self, measures: dict[str, float]) -> None:
        """Nobody follows but the run's folder: Ray Train's own report is a barrier."""

    def stop_requested(self) -> bool:
        """Whether the driver left a stop file (seen by rank 0, which tells the others)."""
        return self._stop.is_set()


def _node_of_each_rank(world_size: int) -> tuple[str, ...]:
    import ray
    import torch.distributed as dist

    found = [ray.get_runtime_context().get_node_id()] * world_size
    if world_size > 1:
        dist.all_gather_object(found, found[0])
    return tuple(found)


def _uploader(checkpoints: Folder, rank: int) -> Callable[..., object]:
    import ray.train

    def upload(staged: "ray.train.Checkpoint", name: str) -> "ray.train.Checkpoint":
        target = checkpoints / name
        checkpoint.publish(Path(staged.path), target, rank)
        return ray.train.Checkpoint(path=target.path, filesystem=target.filesystem)

    return upload


def watch_stop_file(run: Folder) -> threading.Event:
    """An event that is set once the folder holds a stop file."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_POLL_SECONDS):
            if run.exists(STOP_FILE):
                stop.set()

    threading.Thread(target=watch, name="stop-file", daemon=True).start()
    return stop
