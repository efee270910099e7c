"""One worker's part in saving checkpoints, beside the training.

stage on this machine's disk (the training waits) → hash, upload, publish (it does not)
    → settle: all workers hear how it went; the last good checkpoints stay, older ones go
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
from ..common.uploader import Uploads
from ..config.metric import Metric
from ..config.sections import CheckpointSettings
from ..records import checkpoint

_MOST_FAILURES = 3
_FULL_BYTES = 2**20


@dataclass(frozen=True)
class SaveState:
    """What has become of the saves."""

    step: int | None
    """Of the newest checkpoint that is known to be whole."""
    error: str | None = None
    """Why the last save failed."""
    waited_seconds: float = 0.0
    """How long saves waited for the one before: the store is slower than `every_steps` asks."""


class Saver:
    """Saves of one worker; all workers call it at the same steps.

    Args:
        checkpoints: where they go.
        scratch: a folder on this machine's disk.
        rank: of this worker.
        world_size: how many there are.
        settings: how many are kept.
        watched: the measurement by which one is the best.
        uploads: this worker's.
        before: called in the upload's thread before a checkpoint is published.
        gather: exchanges a value between all workers.
        tell: called when it is known how a save went.
        last_step: of the checkpoint that training starts from.
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
        uploads: Uploads,
        before: Callable[[], None],
        gather: Callable[[str | None], list[str | None]],
        tell: Callable[[SaveState], None],
        last_step: int | None,
    ) -> None:
        self._checkpoints = checkpoints
        self._scratch = scratch
        self._rank = rank
        self._world_size = world_size
        self._settings = settings
        self._watched = watched
        self._uploads = uploads
        self._before = before
        self._gather = gather
        self._tell = tell
        self._pending: int | None = None
        self._unstaged: str | None = None
        self._failures = 0
        self.state = SaveState(last_step)

    @property
    def is_over(self) -> bool:
        """Whether this worker's part of the last save is done, or failed."""
        return self._pending is None or self._uploads.is_idle

    def start(self, step: int, write: Callable[[Path], None], metrics: dict[str, float]) -> None:
        """Begin to save; a save that is still under way is settled first.

        Args:
            step: the checkpoint's.
            write: writes this worker's part into a folder.
            metrics: what is noted with it.

        Raises:
            RunError: as `settle`.
        """
        self.settle()
        self._pending = step
        staged = self._stage(write)
        if staged is None:
            return
        target = self._checkpoints / checkpoint.checkpoint_name(step)
        rank, world_size = self._rank, self._world_size

        def upload() -> None:
            self._before()
            manifest = checkpoint.make_manifest(staged, rank, world_size, metrics)
            checkpoint.publish(staged, target, rank, manifest)
            shutil.rmtree(staged)

        def give_up() -> None:
            checkpoint.withdraw(staged, target, rank)
            shutil.rmtree(staged)

        self._uploads.start(upload, give_up)

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and hear how it went on all workers.

        Raises:
            RunError: several saves failed one after the other.
        """
        if self._pending is None:
            return
        self._uploads.wait()
        told = self._gather(self._unstaged or self._uploads.error)
        self._conclude(self._pending, [(rank, error) for rank, error in enumerate(told) if error])
        self._pending = None
        self._tell(self.state)
        if self._failures >= _MOST_FAILURES:
            raise RunError(f"{self._failures} saves failed one after the other; {self._account()}")

    def finish(self) -> None:
        """Wait until all is saved.

        Raises:
            RunError: the last save failed.
        """
        self.settle()
        self._uploads.wait()  # for the rotation
        if self.state.error is not None:
            raise RunError(f"what was reached could not be saved; {self._account()}")

    def _stage(self, write: Callable[[Path], None]) -> Path | None:
        """The folder with this worker's part; None where the disk has no room for it."""
        self._unstaged = None
        staged = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self._scratch))
        try:
            write(staged)
        except (OSError, RuntimeError, SafetensorError) as error:
            if shutil.disk_usage(staged).free > _FULL_BYTES:
                raise
            self._unstaged = f"the disk of {self._scratch} is full: {error}"
            shutil.rmtree(staged)
            return None
        return staged

    def _conclude(self, step: int, errors: list[tuple[int, str]]) -> None:
        waited = self._uploads.waited_seconds
        if errors:
            self._failures += 1
            rank, error = errors[0]
            worker = f"worker {rank}: " if self._world_size > 1 else ""
            told = f"step {step}: {worker}{error}"
            self.state = replace(self.state, error=told, waited_seconds=waited)
            return
        self._failures = 0
        self.state = SaveState(step, None, waited)
        if self._rank == 0:
            self._uploads.start(self._rotate)

    def _rotate(self) -> None:
        # Where this fails, the next one deletes more.
        checkpoint.rotate(self._checkpoints, self._settings.keep, self._watched)

    def _account(self) -> str:
        step = self.state.step
        newest = "there is none yet" if step is None else f"the newest is that of step {step}"
        return f"{self.state.error} (of the checkpoints in {self._checkpoints} {newest})"


def state_record(state: SaveState) -> dict[str, Any]:
    """As run.json has it."""
    return {
        "last_saved_step": state.step,
        "save_error": state.error,
        "save_wait_seconds": round(state.waited_seconds, 2),
    }
