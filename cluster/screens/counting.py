"""A bar of rows while answers are generated or judged."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from ...training.common.progress import Progress


class CountingProgress(Progress):
    """A bar of rows while the block runs, if stderr is a terminal.

    Args:
        what: what is done with the rows.
        console: where to write; stderr by default.
    """

    def __init__(self, what: str, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        )
        self._what = what
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._bars.add_task(what, total=None)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def status(self, text: str) -> None:
        """What is done now, in the place of the rows."""
        self._bars.update(self._bar, description=text)

    def advance(self, done: int, total: int) -> None:
        """Rows so far, and in all."""
        self._bars.update(self._bar, description=self._what, completed=done, total=total)
