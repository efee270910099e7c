"""The program that watches a worker from beside it, which `guard.py` starts.

    python -m finray.training.engine.guard_process PID FILE RUN RANK IN_PROCESS

It loads the standard library alone until the worker hangs.
"""

import os
import signal
import sys
import time
from pathlib import Path

from ..common.processes import is_stopped
from .heartbeat import Beat, Watch

_TICK_SECONDS = 0.2
_END_SECONDS = 2.0
"""Time for the worker to end by itself, with an exit code of its own."""


def main(pid: int, file: Path, run: str, rank: int, in_process: bool) -> None:
    """Watch the parent until it ends, or hangs.

    Args:
        pid: the parent's process id.
        file: its heartbeat.
        run: URI of the run's folder.
        rank: the parent's rank.
        in_process: see `guarded`.
    """
    watch = Watch(file)
    while os.getppid() == pid:
        time.sleep(_TICK_SECONDS)
        try:
            beat = watch.hung(counts=not (in_process and is_stopped(pid)))
        except FileNotFoundError:  # the worker has ended
            return
        if beat is not None:
            _end(pid, _report(beat, pid, file, run, rank, in_process))
            return


def _report(beat: Beat, pid: int, file: Path, run: str, rank: int, in_process: bool) -> str:
    from ..common.storage import Folder
    from ..records.recorder import now, update_run
    from .hangs import WatchedProcess, report_hang

    folder = Folder(run)
    message = report_hang(folder, {rank: WatchedProcess(pid, file)}, beat)
    if in_process:
        failed = {"status": "failed", "error": message, "finished_at": now()}
        update_run(folder, lambda record: record.update(failed))
    return message


def _end(pid: int, message: str) -> None:
    """End the parent: by its own thread, or, if that cannot run, by SIGKILL."""
    print(f"finray: {message}", file=sys.stderr, flush=True)
    os.write(sys.stdout.fileno(), b".")
    deadline = time.monotonic() + _END_SECONDS
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(_TICK_SECONDS)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _pid, _file, _run, _rank, _in_process = sys.argv[1:]
    main(int(_pid), Path(_file), _run, int(_rank), _in_process == "1")
