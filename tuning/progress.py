"""The interface through which a sweep reports its progress; without Ray."""

from dataclasses import dataclass

from ..training.common.progress import Progress
from ..training.records.run_folder import Record


@dataclass(frozen=True)
class Ending:
    """The end of one trial."""

    number: int
    state: str
    """finished, pruned or failed."""
    text: str
    """One line for the user: the reached metrics, the reason or the error."""


class SweepProgress(Progress):
    """Receives the events of a sweep; this base class ignores them."""

    def trial_ended(self, ending: Ending, record: Record) -> None:
        """Called when a trial has ended; `record` is the content of sweep.json."""
