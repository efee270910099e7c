"""Has a worker watched by a small process beside it, where its driver cannot.

A thread of the worker would be stopped with it, and would wait with it for Python's lock.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..common.errors import RunError
from ..common.scratch import scratch_folder
from ..common.storage import Folder
from .heartbeat import Heartbeat, Timeout, expect_beats

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def guarded(run: Folder, rank: int, timeout: Timeout, in_process: bool) -> Iterator[Heartbeat]:
    """A heartbeat that a process beside this one watches; it ends this one if it hangs.

    Args:
        run: the run's folder, which receives the stacks.
        rank: this worker's rank.
        timeout: the setting scale.hang_timeout; None: nothing is watched.
        in_process: this process is the driver too: the guard records the failure in run.json, and
            the time for which this process is stopped does not count.
    """
    if timeout is None:
        yield Heartbeat()
        return
    with scratch_folder("heartbeat") as folder:
        file = folder / "heartbeat"
        expect_beats(file, timeout)
        with Heartbeat(file, timeout) as heartbeat:
            guard = _start(file, run, rank, in_process)
            try:
                yield heartbeat
            finally:
                guard.kill()
                guard.wait()


def _start(file: Path, run: Folder, rank: int, in_process: bool) -> "subprocess.Popen[bytes]":
    arguments = [str(os.getpid()), str(file), run.uri, str(rank), str(int(in_process))]
    # The guard stays when the terminal's signals end others; it inherits what is blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "finray.training.engine.guard_process", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert guard.stdout is not None
    threading.Thread(target=_exit_on_request, args=(guard.stdout,), daemon=True).start()
    return guard


def _exit_on_request(requests: IO[bytes]) -> None:
    """End this process when the guard says so; its other threads may hang."""
    with requests:
        if requests.read(1):
            os._exit(RunError.exit_code)
