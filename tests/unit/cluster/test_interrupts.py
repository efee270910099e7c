"""Signals to the command: the first saves, the second ends it whatever it does."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

LONG = 300.0
PROGRAM = """
import signal, sys, time
from finray.cluster import interrupts
from finray.training.common.background import Stop

# The tests may run under nohup or in a shell's background, where children ignore these.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts._GRACE_SECONDS = 0.5
stop = Stop(armed=True)
with interrupts.graceful_interrupts(stop):
    print("ready", flush=True)
    {work}
print("end", flush=True)
"""
NEVER_RETURNS = "sum(range(10**15))"
SAVES = "stop.requested.wait(); time.sleep(0.7); print('saved', flush=True)"
HANGS_LATER = "\n    try: time.sleep(300)\n    finally: sum(range(10**15))"

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program, whose first line has come."""
    started: list[subprocess.Popen[bytes]] = []

    def run(work: str, **options: object) -> "subprocess.Popen[bytes]":
        program = [sys.executable, "-c", PROGRAM.replace("{work}", work)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        child: subprocess.Popen[bytes] = subprocess.Popen(program, **pipes)  # type: ignore[call-overload]
        started.append(child)
        if child.stdout is not None:
            assert child.stdout.readline() == b"ready\n"
        return child

    yield run
    for child in started:
        child.kill()
        child.communicate()


@pytest.mark.long
@pytest.mark.parametrize("work", [NEVER_RETURNS, HANGS_LATER])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_it(work: str, number: signal.Signals, start: Start) -> None:
    """Also in a call that never comes back to Python, and in a clean-up that hangs."""
    child = start(work)
    child.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.8)
    child.send_signal(number)
    assert child.wait(LONG) == -signal.SIGKILL


def test_the_second_signal_interrupts(start: Start) -> None:
    child = start("time.sleep(300)")
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and child.stderr.readline() == b"\n"
    assert b"Press Ctrl-C again" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    out, printed = child.communicate(timeout=LONG)
    assert child.returncode == -signal.SIGINT and out == b""
    assert printed.endswith(b"KeyboardInterrupt\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_requests_a_save(number: signal.Signals, start: Start) -> None:
    child = start(SAVES)
    child.send_signal(number)
    out, _ = child.communicate(timeout=LONG)
    assert (child.returncode, out) == (0, b"saved\nend\n")


def test_a_terminal_that_closes_does_not_disturb_the_save(start: Start) -> None:
    """Two SIGHUP come, and what is printed afterwards goes nowhere."""
    reader, writer = os.pipe()
    terminal, side = pty.openpty()
    work = f"os_write = __import__('os').write; os_write({writer}, b'.'); {SAVES}; "
    work += f"os_write({writer}, b'saved')"
    child = start(work, stdout=side, stderr=side, pass_fds=[writer], start_new_session=True)
    os.close(side)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(terminal)
    child.send_signal(signal.SIGHUP)
    with suppress(subprocess.TimeoutExpired):
        child.wait(0.3)
    child.send_signal(signal.SIGHUP)
    assert child.wait(LONG) == 0
    assert os.read(reader, 5) == b"saved"
    os.close(reader)


def test_what_nohup_ignores_stays_ignored(start: Start) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = start("time.sleep(0.5)")
    finally:
        signal.signal(signal.SIGHUP, before)
    child.send_signal(signal.SIGHUP)
    out, _ = child.communicate(timeout=LONG)
    assert (child.returncode, out) == (0, b"end\n")
