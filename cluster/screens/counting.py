"""Bars: one for any work of a known size, and one of rows that are answered or judged."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from ...training.common.progress import Progress


class BarProgress(Progress):
    """A bar while the block runs, if stderr is a terminal.

    Args:
        columns: what the bar shows.
        what: its description.
        console: where to write; stderr by default.
        visible: show it before the first advance.
    """

    def __init__(
        self, *columns: ProgressColumn, what: str, visible: bool, console: Console | None = None
    ) -> None:
        console = console or Console(stderr=True)
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._bars.add_task(what, total=None, visible=visible)

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


class CountingProgress(BarProgress):
    """A bar of rows while the block runs, if stderr is a terminal.

    Args:
        what: what is done with the rows.
    """

    def __init__(self, what: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        )
        super().__init__(*columns, what=what, visible=True)
        self._what = what

    def status(self, text: str) -> None:
        """What is done now, in place of the rows."""
        self._bars.update(self._bar, description=text)

    def advance(self, done: int, total: int) -> None:
        """Rows so far, and in all."""
        self._bars.update(self._bar, description=self._what, completed=done, total=total)
