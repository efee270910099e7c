"""The process that sends a sweep to a tracker: NAME FOLDER; see `records.tracking_program`.

The sweep is a run of its own, with a value for each trial that ended; each of these trials is a run
below it.
"""

import sys
from collections.abc import Callable

from ..training.common.storage import Folder
from ..training.records.run_folder import Record
from ..training.records.trackers import TRACKERS, TrackedRun, Tracker
from ..training.records.tracking import read_state, write_state
from ..training.records.tracking_program import (
    RunFeed,
    client_folder,
    config_of,
    follow,
    on_disk,
)
from .sweep_folder import BEST_FILE, REPORT_FILE, read_sweep, trial_folder

PROGRAM = "finray.tuning.tracking_program"
_ENDED = ("finished", "pruned", "failed")


class SweepFeed:
    """A sweep and its trials.

    Args:
        folder: the sweep's folder.
        name: the tracker.
        make: makes a client of it.
    """

    def __init__(self, folder: Folder, name: str, make: Callable[[], Tracker]) -> None:
        self._folder = folder
        self._name = name
        self._make = make
        self._state = read_state(folder, name)
        self._tracker: Tracker | None = None

    def poll(self) -> None:
        """Send the trials that ended since; raises what the client raises."""
        record = read_sweep(self._folder)
        if record is None:
            return
        tracker = self._opened(record)
        for row in record["trials"]:
            number = str(row["number"])
            if row["state"] not in _ENDED or number in self._state.children:
                continue
            self._send_trial(record, row)
            if row["values"]:
                names = [objective["metric"] for objective in record["objectives"]]
                values = dict(zip(names, row["values"], strict=True))
                tracker.log([(row["number"], values)])
            self._state.children.append(number)
            self.note(None)
        if self._state.error is not None:
            self.note(None)

    def finish(self) -> None:
        """Send the sweep's report and its best recipe and weights, and end it."""
        record = read_sweep(self._folder)
        if record is None:
            return
        tracker = self._opened(record)
        names = [(REPORT_FILE, "report"), (BEST_FILE, "recipe")]
        if record.get("result"):
            names.append((str(record["result"]), "model"))
        for name, kind in names:
            if self._folder.exists(name):
                with on_disk(self._folder, name) as path:
                    tracker.add(path, name, kind)
        tracker.close(str(record["status"]))
        self._tracker = None
        self.note(None)

    def note(self, error: str | None) -> None:
        """Write how far the tracker is."""
        self._state.error = error
        write_state(self._folder, self._name, self._state)

    def _send_trial(self, record: Record, row: Record) -> None:
        feed = RunFeed(
            trial_folder(self._folder, row["number"]),
            self._name,
            self._make,
            kind="trial",
            sweep=str(record["name"]),
            parent=self._state.id,
        )
        feed.poll()
        feed.finish(with_weights=False)

    def _opened(self, record: Record) -> Tracker:
        if self._tracker is None:
            tracker = self._make()
            run = TrackedRun(
                name=str(record["name"]),
                kind="sweep",
                folder=client_folder(self._folder, self._name),
                config=config_of(record["settings"]),
                sweep=str(record["name"]),
            )
            self._state.opened_as(tracker.open(run, self._state.id))
            self.note(self._state.error)  # what fails from here on resumes this run of the tracker
            tracker.describe(run)
            self._tracker = tracker
            self.note(None)
        return self._tracker


def main() -> None:
    """Follow the sweep that the command line names."""
    name, uri = sys.argv[1:]
    folder = Folder(uri)
    follow(SweepFeed(folder, name, TRACKERS[name]), folder.local is None)


if __name__ == "__main__":
    main()
