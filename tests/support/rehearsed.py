"""A rehearsal without its child process, which takes seconds: most tests try something else."""

from finray.training.config.recipe import Recipe
from finray.training.rehearsal import child
from finray.training.rehearsal.outcome import Outcome

OK = Outcome("ok", isolation="documents")
CHILD = child._Child
"""The process of a real rehearsal."""


class NothingWrong:
    """In the place of the child: every recipe is right, as those on the tiny model are."""

    def start(self, recipe: Recipe) -> None:
        """Begin with a recipe."""

    def close(self) -> None:
        """No other recipe follows."""

    def outcome(self) -> Outcome:
        return OK

    def end(self) -> None:
        """No process runs."""


def without_child() -> None:
    """Rehearse nothing in this process, and in those forked from it."""
    child._Child = NothingWrong  # type: ignore[assignment,misc]
