"""Saves one worker's part of each checkpoint while the training continues.

write to this machine's disk (the training waits) → hash, upload, publish (in a thread)
    → `wait`: all workers exchange the outcome; old checkpoints are deleted
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..common.errors import RunError
from ..common.storage import Folder
from ..common.uploader import Uploader
from ..config.metric import Metric
from ..config.sections import CheckpointSettings
from ..records import checkpoint

_MOST_FAILURES = 3
_FULL_BYTES = 2**20


@dataclass(frozen=True)
class SaveState:
    """The outcome of the saves so far."""

    step: int | None
    """Step of the newest checkpoint that is complete on all workers; None if there is none."""
    error: str | None = None
    """Why the last save failed; None if it succeeded."""
    waited_seconds: float = 0.0
    """Total time that saves waited for earlier ones, because the storage is slow."""

    def as_record(self) -> dict[str, Any]:
        """The fields of run.json."""
        return {
            "last_saved_step": self.step,
            "save_error": self.error,
            "save_wait_seconds": round(self.waited_seconds, 2),
        }


class Checkpointer:
    """Saves checkpoints of one worker; all workers call it at the same steps.

    Args:
        checkpoints: the folder of the checkpoints.
        scratch: a folder on this machine's disk.
        rank: rank of this worker.
        world_size: number of workers.
        settings: how many checkpoints are kept.
        watched: the metric that decides which checkpoint is the best.
        uploads: uploads in the background.
        before_publishing: called in the upload's thread before a checkpoint becomes visible.
        gather: returns every worker's value, by rank.
        on_saved: called when all workers have the outcome of a save.
        last_step: step of the checkpoint that training starts from; None without one.
    """

    def __init__(
        self,
        checkpoints: Folder,
        scratch: Path,
        *,
        rank: int,
        world_size: int,
        settings: CheckpointSettings,
        watched: Metric,
        uploads: Uploader,
        before_publishing: Callable[[], None],
        gather: Callable[[str | None], list[str | None]],
        on_saved: Callable[[SaveState], None],
        last_step: int | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._scratch = scratch
        self._rank = rank
        self._world_size = world_size
        self._settings = settings
        self._watched = watched
        self._uploads = uploads
        self._before_publishing = before_publishing
        self._gather = gather
        self._on_saved = on_saved
        self._pending: int | None = None
        self._write_error: str | None = None
        self._failures = 0
        self.state = SaveState(last_step)

    @property
    def is_idle(self) -> bool:
        """True if this worker's part of the last save is complete, or failed."""
        return self._pending is None or self._uploads.is_idle

    def save(self, step: int, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Start a save; waits for the previous one if it still runs.

        Args:
            step: the step of the checkpoint.
            write: writes this worker's part into a folder.
            metrics: values that are stored with the checkpoint.

        Raises:
            RunError: as `wait`.
        """
        self.wait()
        self._pending = step
        staged = self._write(write)
        if staged is None:
            return
        target = self._checkpoints / checkpoint.checkpoint_name(step)
        rank, world_size = self._rank, self._world_size

        def upload() -> None:
            self._before_publishing()
            manifest = checkpoint.make_manifest(staged, rank, world_size, metrics)
            checkpoint.publish(staged, target, rank, manifest)
            shutil.rmtree(staged)

        def give_up() -> None:
            checkpoint.remove_partial(staged, target, rank)
            shutil.rmtree(staged)

        self._uploads.start(upload, give_up)

    def wait(self) -> None:
        """Wait for the running save, if there is one, and exchange its outcome with all workers.

        Raises:
            RunError: several saves in a row failed.
        """
        if self._pending is None:
            return
        self._uploads.wait()
        errors = self._gather(self._write_error or self._uploads.error)
        self._update_state(self._pending, errors)
        self._pending = None
        self._on_saved(self.state)
        if self._failures >= _MOST_FAILURES:
            raise RunError(
                f"saving a checkpoint failed {self._failures} times in a row; {self._summary()}"
            )

    def close(self) -> None:
        """Wait until everything is saved.

        Raises:
            RunError: the last save failed.
        """
        self.wait()
        self._uploads.wait()  # for the rotation
        if self.state.error is not None:
            raise RunError(f"the last checkpoint could not be saved; {self._summary()}")

    def _write(self, write: Callable[[Path], None]) -> Path | None:
        """Write this worker's part into a new folder; returns it, or None if the disk is full."""
        self._write_error = None
        staged = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._scratch))
        try:
            write(staged)
        except (OSError, RuntimeError, SafetensorError) as error:
            if shutil.disk_usage(staged).free > _FULL_BYTES:
                raise
            self._write_error = f"the disk of {self._scratch} is full: {error}"
            shutil.rmtree(staged)
            return None
        return staged

    def _update_state(self, step: int, errors: list[str | None]) -> None:
        waited = self._uploads.waited_seconds
        failed = [(rank, error) for rank, error in enumerate(errors) if error]
        if failed:
            self._failures += 1
            rank, error = failed[0]
            worker = f"worker {rank}: " if self._world_size > 1 else ""
            message = f"step {step}: {worker}{error}"
            self.state = replace(self.state, error=message, waited_seconds=waited)
            return
        self._failures = 0
        self.state = SaveState(step, None, waited)
        if self._rank == 0:
            self._uploads.start(self._rotate)

    def _rotate(self) -> None:
        # If this fails, the next rotation deletes more.
        checkpoint.rotate(self._checkpoints, self._settings.keep, self._watched)

    def _summary(self) -> str:
        step = self.state.step
        newest = "no checkpoint yet" if step is None else f"newest checkpoint: step {step}"
        return f"{self.state.error} ({newest}, in {self._checkpoints})"
