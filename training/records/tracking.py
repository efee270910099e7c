"""Sends a run's metrics to experiment trackers, from processes beside the driver.

    metrics.jsonl ─► a process for each tracker ─► its client ─► its server

The run's own file is the queue: it takes no memory, survives a restart, and a tracker that was down
gets what it missed once it is back. A tracker cannot stop or slow a run; what it did not get at the
end is counted in one warning.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.formatting import is_number, one_line
from ..common.progress import Progress
from ..common.secrets import redact
from ..common.storage import Folder
from .run_folder import METRICS_FILE, parse_record

TRACKERS_FOLDER = "trackers"
END = b"end\n"
"""What the driver writes to a tracker's process when all files of the run are written; without it,
the driver died, and the run may go on later."""
PROGRAM = "finray.training.records.tracking_program"
_HEALTHY_SECONDS = 300.0
"""Time at the end for what is left, such as a large adapter."""
_ILL_SECONDS = 30.0
"""The same where the last request failed, or none was answered yet."""
_NOT_SENT = ("step", "epoch")


@dataclass
class TrackerState:
    """How far a tracker is; the file trackers/NAME.json in the run's folder."""

    id: str | None = None
    """The tracker's own id of the run."""
    steps: dict[str, int] = field(default_factory=dict)
    """The last step that was sent, by metric."""
    error: str | None = None
    """Why the last request failed; None if it did not."""
    children: list[str] = field(default_factory=list)
    """Of a sweep: the trials that were sent whole."""

    def opened_as(self, id: str) -> None:
        """Note the id that a tracker gives; with another than before it gets all once more."""
        if self.id not in (None, id):
            self.steps.clear()
            self.children.clear()
        self.id = id

    def unsent(self, lines: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
        """The values of metrics.jsonl that were not sent yet."""
        left = []
        for line in lines:
            step = int(line["step"])
            values = {
                name: float(value)
                for name, value in line.items()
                if name not in _NOT_SENT and is_number(value) and step > self.steps.get(name, -1)
            }
            if values:
                left.append((step, values))
        return left

    def sent(self, lines: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Note that these were sent."""
        for step, values in lines:
            self.steps.update(dict.fromkeys(values, step))


def read_state(folder: Folder, name: str) -> TrackerState:
    """How far a tracker is with a run; a new state where there is none, or a damaged one."""
    with suppress(OSError, TypeError):
        content = parse_record((folder / TRACKERS_FOLDER).read(f"{name}.json"))
        return TrackerState(**(content or {}))
    return TrackerState()


def write_state(folder: Folder, name: str, state: TrackerState) -> None:
    """Write how far a tracker is."""
    (folder / TRACKERS_FOLDER).write(f"{name}.json", json.dumps(asdict(state)).encode())


@contextmanager
def tracked(
    folder: Folder, names: Sequence[str], progress: Progress, program: str = PROGRAM
) -> Iterator[None]:
    """Let trackers follow a run or a sweep for as long as the context lasts.

    Args:
        folder: its folder.
        names: the trackers; those that are a program.
        progress: receives one warning for a tracker that did not get everything.
        program: the module that follows.
    """
    children = {name: _start(program, name, folder) for name in names}
    try:
        yield
    finally:
        for name, child in children.items():
            _end(name, child, folder, progress)


def lacking(folder: Folder, names: Sequence[str]) -> list[str]:
    """Those trackers that lack something of a run that has ended."""
    lines = complete_lines(folder)
    states = {name: read_state(folder, name) for name in names}
    return [
        name
        for name, state in states.items()
        if state.id is None or state.error is not None or state.unsent(lines)
    ]


def _start(program: str, name: str, folder: Folder) -> "subprocess.Popen[bytes]":
    # A session of its own: Ctrl-C is for the run, whose end this process waits for.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", program, name, folder.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(name: str, child: "subprocess.Popen[bytes]", folder: Folder, progress: Progress) -> None:
    """Let a tracker's process send what is left; one that takes too long is ended."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(END)
        child.stdin.close()
    progress.status(f"sending the rest to {name}")
    started, is_late = time.monotonic(), False
    while child.poll() is None:
        seconds = time.monotonic() - started
        state = read_state(folder, name)
        is_healthy = state.id is not None and state.error is None
        limit = _HEALTHY_SECONDS if is_healthy else _ILL_SECONDS
        if seconds > limit:
            child.kill()
            child.wait()
            is_late = True
        time.sleep(0.1)
    _report(name, child.returncode, is_late, folder, progress)


def _report(name: str, code: int, is_late: bool, folder: Folder, progress: Progress) -> None:
    state = read_state(folder, name)
    left = len(state.unsent(complete_lines(folder)))
    if code == 0 and state.error is None:
        return
    cause = state.error or ("it did not answer in time" if is_late else "its process ended")
    progress.note(
        f"log.to: {name}: {redact(one_line(cause))}; {left} lines of {METRICS_FILE} were not sent, "
        "and the run went on without it; the same command sends the rest later"
    )


def complete_lines(folder: Folder) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    try:
        content = folder.read(METRICS_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = map(parse_record, content.splitlines())
    return [record for record in records if record is not None and "step" in record]
