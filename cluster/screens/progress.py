"""Progress of a run, read from its folder.

The worker that writes metrics.jsonl may be on another machine, so the display polls the folder
and needs nothing else from the run.
"""

import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from ...training.common import formatting
from ...training.common.errors import InputError
from ...training.common.progress import Progress
from ...training.common.storage import Folder
from ...training.records.labels import key_metrics, label_of
from ...training.records.run_folder import METRICS_FILE, Record, parse_record, read_run
from .progress_display import Display, State, choose_display

TICK = 0.25
"""Seconds between two checks for something to read or draw."""
LOCAL_POLL = 0.5
REMOTE_POLL = 5.0
WINDOW = 20
"""Logged steps over which the speed, and with it the time left, is measured."""
LONG_WAIT = 5.0
"""Seconds spent waiting for saves above which the user is informed."""


class ProgressWatcher(Progress):
    """Shows a run's progress while the block runs; the last lines are shown before it ends.

    On a terminal and in a notebook: one live line, with evaluations above it. Elsewhere: plain
    lines.

    Args:
        folder: the run's folder; where it is chosen only later, `run_started` takes it.
        console: where to write; stderr by default, so that stdout stays the command's result.
        poll_seconds: how often the folder is read; the default depends on its storage.
    """

    def __init__(
        self,
        folder: Folder | None = None,
        console: Console | None = None,
        poll_seconds: float | None = None,
    ) -> None:
        console = console or Console(stderr=True)
        self._state = State()
        self._display: Display = choose_display(console)(console, self._state)
        self._poll_seconds = poll_seconds
        self._run: _WatchedRun | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        """Held while the state changes or the display draws it."""
        self._thread = threading.Thread(target=self._watch, name="finray-progress", daemon=True)
        if folder is not None:
            self.run_started(folder)

    def __enter__(self) -> Self:
        self._display.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._run is not None:
                self._run.poll()
            self._display.close()

    def run_started(self, folder: Folder) -> None:
        """Show what is added to this run's folder from now on, not what it already holds."""
        run = _WatchedRun(folder, self._state, self._display)
        run.poll(quiet=True)
        with self._lock:
            self._run = run
        self.status("starting the workers and loading the model")

    def status(self, text: str) -> None:
        """Show what the run does outside its steps, such as "loading the model"."""
        with self._lock:
            self._state.phase = formatting.one_line(text)
            self._display.changed()
            self._display.tick()

    def note(self, text: str) -> None:
        """Show a line that stays."""
        with self._lock:
            self._display.note(formatting.one_line(text))

    def _watch(self) -> None:
        next_poll = 0.0
        while not self._stop.wait(TICK):
            with self._lock:
                if self._run is not None and time.monotonic() >= next_poll:
                    self._run.poll()
                    next_poll = time.monotonic() + (self._poll_seconds or self._run.poll_seconds)
                self._display.tick()


class _WatchedRun:
    """One run's folder: what it gained at each poll goes into the state and onto the display."""

    def __init__(self, folder: Folder, state: State, display: Display) -> None:
        self._folder = folder
        self._state = state
        self._display = display
        self._tail = MetricsTail(folder)
        self._speed = Speed()
        self._shown_evaluations: set[tuple[object, ...]] = set()
        self._restarts = 0
        self._notices = 0
        self._save_error: str | None = None
        self._wait_was_shown = False
        self.poll_seconds = REMOTE_POLL if folder.local is None else LOCAL_POLL

    def poll(self, quiet: bool = False) -> None:
        try:
            run = read_run(self._folder) or {}
            lines, started_again = self._tail.poll()
        except (OSError, InputError):
            return  # the storage may be unreachable for a moment; the next poll reads it again
        self._take_run(run, quiet)
        if started_again:
            self._speed = Speed()
        for line in lines:
            self._take_line(line, quiet)

    def _take_run(self, run: Record, quiet: bool) -> None:
        self._state.total = run.get("total_steps")
        restarts = run.get("restarts") or []
        for restart in restarts[self._restarts :]:
            reason = formatting.one_line(str(restart.get("reason") or "unknown reason"))
            if not quiet:
                self._display.note(f"restart at step {restart.get('step')}: {reason}")
        self._restarts = len(restarts)
        notices = run.get("notices") or []
        for notice in notices[self._notices :]:
            if not quiet:
                self._display.note(formatting.one_line(str(notice)))
        self._notices = len(notices)
        self._take_saves(run, quiet)

    def _take_saves(self, run: Record, quiet: bool) -> None:
        """Show failed saves, and that the storage is too slow."""
        self._state.saved = run.get("last_saved_step")
        error, self._save_error = self._save_error, run.get("save_error")
        if self._save_error not in (None, error) and not quiet:
            newest = "none yet" if self._state.saved is None else f"step {self._state.saved}"
            self._display.note(
                f"a save failed ({formatting.one_line(str(self._save_error))}); training "
                f"continues, last saved: {newest}"
            )
        waited = run.get("save_wait_seconds")
        if formatting.is_number(waited) and waited > LONG_WAIT and not self._wait_was_shown:
            self._wait_was_shown = True
            self._display.note(
                f"training has waited {formatting.duration(waited)} for checkpoints to be stored; "
                "a larger checkpoint.every_steps saves less often"
            )

    def _take_line(self, line: Record, quiet: bool) -> None:
        if not formatting.is_number(line.get("step")):
            return
        if key_metrics(line):
            self._take_evaluation(line, quiet)
        if line.get("skipped") and not quiet:
            skipped = f"{line['skipped']} of the last steps changed nothing"
            self._display.note(f"step {line['step']}: {skipped}: not finite")
        if line.get("unrewarded") and not quiet:
            skipped = f"{line['unrewarded']} of the last steps changed nothing"
            self._display.note(f"step {line['step']}: {skipped}: no completion got a reward")
        if "loss" in line:
            self._speed.add(int(line["step"]), line.get("seconds"))
            self._state.take(line, None if quiet else self._speed.seconds_per_step())
        if not quiet:
            # The base model is evaluated at step 0, before there is a loss to show.
            self._state.phase = "training" if self._state.step is None else ""
            self._display.changed()

    def _take_evaluation(self, line: Record, quiet: bool) -> None:
        """Show an evaluation once, even if a restart makes the file be read again."""
        evaluation = (line["step"], *((name, line[name]) for name in key_metrics(line)))
        if evaluation not in self._shown_evaluations and not quiet:
            self._display.note(evaluation_text(line))
        self._shown_evaluations.add(evaluation)


class MetricsTail:
    """The lines added to metrics.jsonl since the last poll."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._offset = 0
        self._before = b""
        """The bytes just before the offset; if they changed, the file was rewritten."""

    def poll(self) -> tuple[list[Record], bool]:
        """(complete new lines, whether the file was rewritten since the last poll).

        A resumed run cuts the file back to its checkpoint, so it may be shorter than it was, or
        already longer again.
        """
        path = self._folder.file(METRICS_FILE)
        try:
            file = self._folder.filesystem.open_input_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return [], False
        with file:
            start = self._offset - len(self._before)
            file.seek(min(start, file.size()))
            content = bytes(file.read())
            again = not content.startswith(self._before)
            if again:
                self._offset, self._before = 0, b""
                file.seek(0)
                content = bytes(file.read())
        content = content[len(self._before) :]
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._before = (self._before + whole)[-64:]
        records = [parse_record(line) for line in whole.splitlines()]
        return [record for record in records if record is not None], again


class Speed:
    """Seconds a step takes, over the last `WINDOW` logged steps."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque([(0, 0.0)], maxlen=WINDOW)

    def add(self, step: int, seconds: Any) -> None:
        """Take a logged step and the seconds that all steps up to it took."""
        if not formatting.is_number(seconds):
            return
        if self._seen and (step <= self._seen[-1][0] or seconds <= self._seen[-1][1]):
            self._seen.clear()  # a restart, from an earlier step
        self._seen.append((step, seconds))

    def seconds_per_step(self) -> float | None:
        """None if fewer than two steps were logged."""
        if len(self._seen) < 2:
            return None
        (first, started), (last, now) = self._seen[0], self._seen[-1]
        return (now - started) / (last - first)


def evaluation_text(line: Record) -> str:
    """An evaluation line of metrics.jsonl: step 100  held-out loss 1.234  exact match 45.0%."""
    parts = [f"step {formatting.count(line.get('step'))}"]
    for name in ("eval_loss", "eval_token_accuracy", *key_metrics(line)):
        if name in line:
            measure = label_of(name)
            part = f"{measure.title} {measure.write(line[name])}"
            if part not in parts:
                parts.append(part)
    return "  ".join(parts)
