"""How a sweep says what it does, to whoever watches it; without Ray."""

from dataclasses import dataclass

from ..training.common.progress import Progress
from ..training.records.run_folder import Record


@dataclass(frozen=True)
class Ending:
    """How a trial ended."""

    number: int
    state: str
    """finished, pruned or failed."""
    text: str
    """A line about it for people."""


class SweepProgress(Progress):
    """Receives what happens in a sweep; this one shows nothing."""

    def trial_ended(self, ending: Ending, record: Record) -> None:
        """A trial ended; `record` is sweep.json."""
