"""How long-running work reports its progress."""

from .storage import Folder


class Progress:
    """Receives the progress of a run. This class shows nothing; displays override its methods."""

    def status(self, text: str) -> None:
        """Report the current activity in a few words: "loading the model"."""

    def note(self, text: str) -> None:
        """Report in one line what must stay on the screen, such as a warning."""

    def advance(self, done: int, total: int) -> None:
        """Report how much of the work is done, in a unit of the caller's choice, such as bytes."""

    def run_started(self, folder: Folder) -> None:
        """Report that the workers start: from now on the run's folder receives metrics."""


SILENT = Progress()
