"""How long work says what it does, to whoever watches it."""

from .storage import Folder


class Progress:
    """Receives what happens. This one shows nothing; a display overrides what it shows."""

    def status(self, text: str) -> None:
        """What happens now, in a few words: "loading the model"."""

    def advance(self, done: int, total: int) -> None:
        """How much of the work is done, in units of the caller's, such as bytes."""

    def run_started(self, folder: Folder) -> None:
        """The workers start: from now on metrics come into the run's folder."""


SILENT = Progress()
