"""Ctrl-C, SIGTERM and SIGHUP: the first saves a checkpoint and exits, the second exits immediately.

Python runs its handlers between two instructions of the main thread, which a call that never
returns does not reach. So a small process counts the signals too, and kills this one if it is still
there a while after the second.
"""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..training.common.background import Stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 10.0
"""Time to end the workers and to leave the folders in order after a second signal."""
_COUNTER = """
import os, select, sys, time
pid, grace, presses = int(sys.argv[1]), float(sys.argv[2]), 0
while os.getppid() == pid and presses < 2:
    if select.select([0], [], [], 0.5)[0]:
        presses += sum(number in (2, 15) for number in os.read(0, 1))
end = time.monotonic() + grace
while os.getppid() == pid and time.monotonic() < end:
    time.sleep(0.1)
if os.getppid() == pid:
    os.kill(pid, 9)
"""
"""Reads the number of each signal from stdin, as a byte."""


@contextmanager
def graceful_interrupts(stop: Stop) -> Iterator[None]:
    """Inside the context, a first signal requests `stop` if that is armed.

    A signal before that, and a second one, raise KeyboardInterrupt. A second SIGHUP does not: the
    kernel and the shell may send one each when a terminal closes. Where SIGHUP is ignored (nohup),
    it stays so. Only the main thread receives signals; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
            if stop.requested.is_set():
                return
        if not stop.armed or stop.requested.is_set():
            raise KeyboardInterrupt
        stop.requested.set()
        print(
            "\nSaving a checkpoint, then exiting. Press Ctrl-C again to exit immediately.",
            file=sys.stderr,
        )

    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    handled = _SIGNALS[:2] if is_ignored else _SIGNALS
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        with _second_signal_ends():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _second_signal_ends() -> Iterator[None]:
    """Inside the context, this process ends some seconds after a second signal in any case."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the counter inherits this
    try:
        counter = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _COUNTER, str(os.getpid()), str(_GRACE_SECONDS)],
            stdin=reader,
            stdout=subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(reader)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        counter.kill()
        counter.wait()


def _leave_terminal() -> None:
    """Send further output nowhere: writing to a terminal that is gone would be an error."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):  # it may be closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nothing, stream)
    os.close(nothing)
