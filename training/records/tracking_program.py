"""The process that sends a run to a tracker: NAME FOLDER.

It reads the run's folder, and from stdin only its end: after the word end the run is over and all
its files are written; without it the driver died.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.scratch import ScratchFolder, scratch_folder
from ..common.secrets import redact
from ..common.storage import Folder
from .run_folder import RECIPE_FILE, REPORT_FILE, Record, flat, read_recipe, read_run
from .trackers import TRACKERS, TrackedRun, Tracker
from .tracking import END, TRACKERS_FOLDER, complete_lines, read_state, write_state

_POLL_SECONDS = 2.0
_REMOTE_POLL_SECONDS = 10.0
_LONGEST_PAUSE = 60.0
_WEIGHTS = ("adapter", "model")


class RunFeed:
    """One run, and a tracker's client for it.

    Args:
        folder: the run's folder.
        name: the tracker.
        make: makes its client.
        kind: run or trial.
        sweep: name of the sweep that it belongs to.
        parent: the tracker's id of the sweep.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        make: Callable[[], Tracker],
        kind: str = "run",
        sweep: str | None = None,
        parent: str | None = None,
    ) -> None:
        self._folder = folder
        self._name = name
        self._make = make
        self._kind = kind
        self._sweep = sweep
        self._parent = parent
        self._state = read_state(folder, name)
        self._tracker: Tracker | None = None

    def poll(self) -> None:
        """Send what is new; raises what the client raises."""
        record = read_run(self._folder)
        if record is None:  # it has not started yet
            return
        tracker = self._opened(record)
        lines = self._state.unsent(complete_lines(self._folder))
        if lines or self._state.error is not None:
            tracker.log(lines)
            self._state.sent(lines)
            self.note(None)

    def finish(self, with_weights: bool = True) -> None:
        """Send the files of a run that has ended, and end it; raises what the client raises."""
        record = read_run(self._folder)
        if record is None:
            return
        tracker = self._opened(record)
        names = [(REPORT_FILE, "report"), (RECIPE_FILE, "recipe")]
        if with_weights and record.get("result") in _WEIGHTS:
            names.append((str(record["result"]), "model"))
        for name, kind in names:
            if self._folder.exists(name):
                with on_disk(self._folder, name) as path:
                    tracker.add(path, name, kind)
        tracker.close(str(record.get("status")))
        self._tracker = None
        self.note(None)

    def note(self, error: str | None) -> None:
        """Write how far the tracker is."""
        self._state.error = error
        write_state(self._folder, self._name, self._state)

    def _opened(self, record: Record) -> Tracker:
        if self._tracker is None:
            tracker, facts = self._make(), self._facts(record)
            self._state.opened_as(tracker.open(facts, self._state.id))
            self.note(self._state.error)  # what fails from here on resumes this run of the tracker
            tracker.describe(facts)
            self._tracker = tracker
            self.note(None)
        return self._tracker

    def _facts(self, record: Record) -> TrackedRun:
        return TrackedRun(
            name=self._folder.name,
            kind=self._kind,
            folder=client_folder(self._folder, self._name),
            config=config_of(read_recipe(self._folder)[1]),
            tags=[str(tag) for tag in record.get("tags") or ()],
            sweep=self._sweep,
            parent=self._parent,
        )


def client_folder(folder: Folder, name: str) -> Path:
    """Where a client may write files of its own: in the run's folder, which W&B's offline mode
    needs, or for an object store in a scratch folder that this process leaves behind."""
    local = (folder / TRACKERS_FOLDER / name).local
    if local is None:
        local = ScratchFolder(name).path
    local.mkdir(parents=True, exist_ok=True)
    return local


def config_of(recipe: Record) -> dict[str, Any]:
    """Settings by dotted key, without secrets, as plain values."""
    return {
        key: value if isinstance(value, bool | int | float) else redact(str(value))
        for key, value in flat(recipe).items()
        if value is not None
    }


def follow(feed: Any, is_remote: bool) -> None:
    """Poll a feed until the driver says that its run is over, or has ended itself."""
    words: list[bytes] = []
    over = threading.Event()

    def wait_for_the_end() -> None:
        words.append(sys.stdin.buffer.readline())
        over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    usual = _REMOTE_POLL_SECONDS if is_remote else _POLL_SECONDS
    pause = usual
    while not over.wait(pause):
        is_sent = _attempt(feed.poll, feed)
        pause = usual if is_sent else min(_LONGEST_PAUSE, 2 * pause)
    works = [feed.poll, feed.finish] if words == [END] else [feed.poll]
    for work in works:
        if not _attempt(work, feed):
            time.sleep(1.0)
            if not _attempt(work, feed):  # once more: it may have been a moment's fault
                sys.exit(1)


def _attempt(work: Callable[[], None], feed: Any) -> bool:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a client may raise anything; the driver reports it
        feed.note(redact(f"{type(error).__name__}: {error}")[:500])
        return False
    return True


@contextmanager
def on_disk(folder: Folder, name: str) -> Iterator[Path]:
    """A file or folder of a run on this machine's disk."""
    if folder.local is not None:
        yield folder.local / name
        return
    with scratch_folder("tracked") as scratch:
        place = folder / name
        if name in _WEIGHTS:
            place.download(scratch / name)
        else:
            (scratch / name).write_bytes(folder.read(name))
        yield scratch / name


def main() -> None:
    """Follow the run that the command line names."""
    name, uri = sys.argv[1:]
    folder = Folder(uri)
    follow(RunFeed(folder, name, TRACKERS[name]), folder.local is None)


if __name__ == "__main__":
    main()
