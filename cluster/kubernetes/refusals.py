"""A mark in the storage: KubeRay repeats a job whose recipe was refused; each attempt ends there.

It counts the repetitions, so that none is left when the job is over, whatever the clocks say.
"""

import json
from contextlib import suppress
from dataclasses import dataclass

from ...training.common.storage import Folder

_FOLDER = ".refused"
"""Beside the runs; no run can have this name."""


@dataclass(frozen=True)
class Refusal:
    """The mark of one job.

    Args:
        storage: the recipe's storage.
        run: the run's name.
        digest: a hash of the recipe; a changed recipe is another job.
    """

    storage: Folder
    run: str
    digest: str

    def write(self, reason: str, repetitions: int) -> None:
        """Leave the mark, for so many repetitions."""
        content = {"digest": self.digest, "reason": reason, "repetitions": repetitions}
        with suppress(OSError):  # an unusable storage is itself a reason to refuse
            (self.storage / _FOLDER).create().write(self._file, json.dumps(content).encode())

    def take(self) -> str | None:
        """Why an earlier attempt was refused, once for each repetition; None if none was."""
        folder = self.storage / _FOLDER
        try:
            content = json.loads(folder.read(self._file))
        except (OSError, ValueError):
            return None
        if content["digest"] != self.digest:
            return None
        left = int(content["repetitions"]) - 1
        with suppress(OSError):
            folder.delete(self._file)
        if left > 0:
            self.write(content["reason"], left)
        return str(content["reason"])

    @property
    def _file(self) -> str:
        return f"{self.run}.json"
