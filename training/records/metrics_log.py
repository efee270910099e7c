"""metrics.jsonl and TensorBoard files, which rank 0 writes during the run."""

import json
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.storage import Folder
from .run_folder import METRICS_FILE, read_metric_lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD = "tensorboard"


class MetricsLog:
    """Appends a line per logged step.

    On a disk each line is written immediately. An object store cannot append, so there `flush`,
    which any thread may call, writes the whole file again.

    Args:
        folder: the run's folder.
        after_step: existing lines of later steps are removed, because a crash undid these steps.
        tensorboard: also write event files (on a disk only).
    """

    def __init__(self, folder: Folder, after_step: int, tensorboard: bool) -> None:
        self._folder = folder
        self._lines = _kept_lines(folder, after_step)
        folder.write(METRICS_FILE, "".join(self._lines).encode())
        self._lock = threading.Lock()
        """Held during a write, so that an older write cannot replace a newer one."""
        self._has_tensorboard = tensorboard and folder.local is not None
        self._tensorboard: SummaryWriter | None = None
        self._after_step = after_step

    def add(self, values: dict[str, float]) -> None:
        """Log one line; `step` is among the values."""
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        line = json.dumps(finite, allow_nan=False) + "\n"
        local = self._folder.local
        if local is not None:
            with (local / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.write(line)
        else:
            self._lines.append(line)
        if self._has_tensorboard and local is not None:
            self._to_tensorboard(local, values)

    def flush(self) -> None:
        """Write all lines logged so far to the storage."""
        with self._lock:
            if self._folder.local is None:
                self._folder.write(METRICS_FILE, "".join(self._lines).encode())
            if self._tensorboard is not None:
                self._tensorboard.flush()

    def _to_tensorboard(self, local: Path, values: dict[str, float]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(local / TENSORBOARD), purge_step=self._after_step + 1
            )
        for name, value in values.items():
            if name not in ("step", "epoch") and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, int(values["step"]))


def _kept_lines(folder: Folder, after_step: int) -> list[str]:
    """The complete lines up to a step; a line that a crash cut off is dropped.

    Raises:
        InputError: a line is damaged; the message names it.
    """
    return [
        text
        for text, line in read_metric_lines(folder)
        if text.endswith("\n") and 0 < after_step >= line["step"]
    ]
