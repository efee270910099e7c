"""How progress is drawn: one live line on a terminal or in a notebook, plain lines elsewhere."""

import html
import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ...training.common import formatting

PLAIN_SECONDS = 1.0
"""Shortest time between two plain lines; evaluations are not delayed."""
NOTEBOOK_NOTES = 12
"""Evaluations and restarts that stay visible in a notebook."""
BAR_FROM_COLUMNS = 90
"""Terminal width from which a progress bar is shown."""


@dataclass
class State:
    """Latest values of a run."""

    phase: str = ""
    step: int | None = None
    total: Any = None
    loss: Any = None
    reward: Any = None
    learning_rate: Any = None
    tokens_per_second: Any = None
    saved: Any = None
    """Step of the last complete checkpoint."""
    left: float | None = None
    """Seconds to the end, as of `since`."""
    since: float = 0.0

    def take(self, line: dict[str, Any], seconds_per_step: float | None) -> None:
        """Take the values of a logged step."""
        self.step = int(line["step"])
        # In the file, null stands for a loss that is not a number.
        self.loss = math.nan if line["loss"] is None else line["loss"]
        self.reward = line.get("reward")
        self.learning_rate = line.get("learning_rate")
        self.tokens_per_second = line.get("tokens_per_second")
        self.left, self.since = None, time.monotonic()
        if seconds_per_step is not None and formatting.is_number(self.total):
            self.left = seconds_per_step * (self.total - self.step)

    @property
    def at_end(self) -> bool:
        """True if the last step is done; evaluating and saving may remain."""
        return (
            formatting.is_number(self.total) and self.step is not None and self.step >= self.total
        )

    def step_text(self) -> str:
        """step 120/400"""
        total = f"/{self.total:.0f}" if formatting.is_number(self.total) else ""
        return f"step {self.step}{total}"

    def values(self) -> list[str]:
        """Loss, learning rate, speed, last save and time left, without missing values."""
        parts = [f"loss {formatting.loss(self.loss)}"]
        if formatting.is_number(self.reward):
            parts.append(f"reward {formatting.loss(self.reward)}")
        if formatting.is_number(self.learning_rate):
            parts.append(f"lr {formatting.exponent(self.learning_rate)}")
        if formatting.is_number(self.tokens_per_second):
            parts.append(f"{formatting.count(self.tokens_per_second)} tok/s")
        if formatting.is_number(self.saved):
            parts.append(f"saved {self.saved:.0f}")
        if self.left is not None and not self.at_end:
            # Between two logged steps, the time left decreases with the clock.
            left = max(0.0, self.left - (time.monotonic() - self.since))
            parts.append(f"{formatting.duration(left)} left")
        return parts


class Display(Protocol):
    """Draws a state. The watcher calls one method at a time, from several threads."""

    def __init__(self, console: Console, state: State) -> None: ...
    def start(self) -> None:
        """Begin to draw."""

    def changed(self) -> None:
        """The state has changed."""

    def note(self, text: str) -> None:
        """A line that stays: an evaluation, a restart."""

    def tick(self) -> None:
        """Called several times a second: draw if it is time."""

    def close(self) -> None:
        """Draw the last state and end."""


def choose_display(console: Console) -> type[Display]:
    """The display that fits where a console writes."""
    if console.is_jupyter:
        return NotebookDisplay
    return LiveDisplay if console.is_terminal and not console.is_dumb_terminal else PlainDisplay


class PlainDisplay:
    """Plain lines, for logs: no control sequences."""

    def __init__(self, console: Console, state: State) -> None:
        self._console = console
        self._state = state
        self._pending = ""
        self._next = 0.0

    def start(self) -> None:
        """Nothing to prepare."""

    def changed(self) -> None:
        """Keep a line until it is due; a newer line replaces it."""
        if self._state.phase:
            self._pending = self._state.phase
        else:
            self._pending = "  ".join([self._state.step_text(), *self._state.values()])

    def note(self, text: str) -> None:
        """Print a line now, before the one that waits."""
        self._print(text)

    def tick(self) -> None:
        """Print the line that waits if `PLAIN_SECONDS` have passed."""
        if time.monotonic() >= self._next:
            self._flush()

    def close(self) -> None:
        """Print the line that waits."""
        self._flush()

    def _flush(self) -> None:
        line, self._pending = self._pending, ""
        if line:
            self._print(line)
            self._next = time.monotonic() + PLAIN_SECONDS

    def _print(self, line: str) -> None:
        self._console.file.write(line + "\n")
        self._console.file.flush()


class NotebookDisplay:
    """The output of a notebook's cell: the last notes, and a line that replaces itself."""

    def __init__(self, console: Console, state: State) -> None:
        # A notebook's kernel has loaded IPython.
        from IPython.display import DisplayHandle

        self._state = state
        self._handle = DisplayHandle()
        self._notes: deque[str] = deque(maxlen=NOTEBOOK_NOTES)
        self._has_changed = False
        self._next = 0.0

    def start(self) -> None:
        """Take a place in the cell's output."""
        self._handle.display(self._content("starting"), raw=True)

    def changed(self) -> None:
        """Draw at the next tick that is due."""
        self._has_changed = True

    def note(self, text: str) -> None:
        """Keep the text above the line."""
        self._notes.append(text)
        self._has_changed = True

    def tick(self) -> None:
        """Draw if something has changed and `PLAIN_SECONDS` have passed."""
        if self._has_changed and time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw the last state."""
        self._draw()

    def _draw(self) -> None:
        state = self._state
        line = state.phase
        if not line and state.step is not None:
            line = "  ".join([state.step_text(), *state.values()])
        self._handle.update(self._content(line), raw=True)
        self._has_changed = False
        self._next = time.monotonic() + PLAIN_SECONDS

    def _content(self, line: str) -> dict[str, str]:
        text = "\n".join([*self._notes, line])
        page = f"<pre>{html.escape(text)}{self._bar()}</pre>"
        return {"text/plain": text, "text/html": page}

    def _bar(self) -> str:
        state = self._state
        if not formatting.is_number(state.total) or state.step is None:
            return ""
        return f'\n<progress max="{state.total:.0f}" value="{state.step}"></progress>'


class LiveDisplay:
    """One line that redraws itself, under everything else that is printed."""

    def __init__(self, console: Console, state: State) -> None:
        self._console = console
        self._state = state
        self._spinner = Spinner("dots", style="cyan")
        self._closed = False
        self._live = Live(
            get_renderable=self._line,
            console=console,
            refresh_per_second=8,
            # A piped stdout holds the result of the command.
            redirect_stdout=sys.stdout.isatty(),
        )

    def start(self) -> None:
        """Take the terminal's last line."""
        self._live.start()

    def changed(self) -> None:
        """No-op: the next refresh draws the state."""

    def note(self, text: str) -> None:
        """Print a line above the live one."""
        self._console.print(Text(text, style="green", overflow="fold"))

    def tick(self) -> None:
        """No-op: rich refreshes by itself."""

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._closed = True
        self._live.transient = self._state.step is None and not self._state.phase
        self._live.stop()

    def _line(self) -> RenderableType:
        state = self._state
        row = Table.grid(padding=(0, 2, 0, 0))
        if state.step is None or (state.phase and not self._closed):
            phase = Text(state.phase or "starting", no_wrap=True, overflow="ellipsis")
            row.add_row(Text("·") if self._closed else self._spinner, phase)
            return row
        cells: list[RenderableType] = [Text(state.step_text(), style="bold", no_wrap=True)]
        if formatting.is_number(state.total) and self._console.width >= BAR_FROM_COLUMNS:
            cells.append(ProgressBar(total=state.total, completed=state.step, width=24))
        finishing = ["finishing"] if state.at_end and not self._closed else []
        values = "  ".join([*state.values(), *finishing])
        row.add_row(*cells, Text(values, no_wrap=True, overflow="ellipsis"))
        return row
