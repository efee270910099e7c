"""The lock of a run's folder: it has one holder, and a stale lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from support.recorded import RecordedProgress

from finray.training.common import lock
from finray.training.common.errors import InputError
from finray.training.common.lock import LOCK_FILE, Lock, hold_run_lock
from finray.training.common.processes import this_process
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def write_lock(folder: Folder, **changes: object) -> None:
    values = asdict(Lock("other", "elsewhere", 1, time.time())) | changes
    folder.write(LOCK_FILE, json.dumps(values).encode())


def test_only_one_holder_at_a_time(folder: Folder) -> None:
    with hold_run_lock(folder, threading.Event(), SILENT) as stale:
        assert stale is None
        with (
            pytest.raises(InputError, match=f"process {os.getpid()} on "),
            hold_run_lock(folder, threading.Event(), SILENT),
        ):
            pass
    assert not folder.exists(LOCK_FILE)


def test_a_lock_that_is_not_renewed_is_taken_over(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder's clock, an hour ahead, does not matter; the age of its file does."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    write_lock(folder, renewed_at=time.time() + 3600)
    old = time.time() - lock.STALE_SECONDS
    os.utime(Path(folder.path) / LOCK_FILE, (old, old))
    progress = RecordedProgress()
    with hold_run_lock(folder, threading.Event(), progress) as stale:
        assert stale is not None and stale.id == "other"
    (line,) = progress.statuses
    assert "waiting up to 0 s" in line and "process 1 on elsewhere" in line


@pytest.mark.parametrize("age", [-3600.0, 0.0])
def test_a_heartbeat_is_awaited_for_a_limited_time(
    age: float, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That holds too if the storage's clock has jumped."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    write_lock(folder, renewed_at=time.time() + 3600)
    written = time.time() - age
    os.utime(Path(folder.path) / LOCK_FILE, (written, written))
    progress = RecordedProgress()
    with hold_run_lock(folder, threading.Event(), progress) as stale:
        assert stale is not None
    assert "waiting up to 1 s" in progress.statuses[0]
    assert not list(Path(folder.path).iterdir()), "what measured the storage's clock stays"


def test_a_lock_of_another_machine_counts_while_it_is_renewed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of that machine does not matter."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 1.0)
    write_lock(folder, renewed_at=5.0)
    renewal = threading.Timer(0.5, write_lock, (folder,), {"renewed_at": 20.0})
    renewal.start()
    with (
        pytest.raises(InputError, match="on elsewhere"),
        hold_run_lock(folder, threading.Event(), SILENT),
    ):
        pass
    renewal.join()
    assert folder.exists(LOCK_FILE), "only its holder deletes it"


def test_the_lock_of_a_dead_process_of_this_machine_is_stale(folder: Folder) -> None:
    script = (
        "import os, sys, threading\n"
        "from finray.training.common.lock import hold_run_lock\n"
        "from finray.training.common.progress import SILENT\n"
        "from finray.training.common.storage import Folder\n"
        "with hold_run_lock(Folder(sys.argv[1]), threading.Event(), SILENT):\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder.uri], check=False)
    assert done.returncode == 9 and folder.exists(LOCK_FILE)
    with hold_run_lock(folder, threading.Event(), SILENT) as stale:
        assert stale is not None


@pytest.mark.parametrize("jump", [-7200.0, -120.0, 7200.0])
def test_a_living_holder_keeps_its_lock_when_the_clock_jumps(folder: Folder, jump: float) -> None:
    with hold_run_lock(folder, threading.Event(), SILENT):
        held = json.loads(folder.read(LOCK_FILE))
        folder.write(LOCK_FILE, json.dumps(held | {"renewed_at": time.time() + jump}).encode())
        with (
            pytest.raises(InputError, match=f"process {os.getpid()} on "),
            hold_run_lock(folder, threading.Event(), SILENT),
        ):
            pass


def test_a_holder_in_another_pid_namespace_is_awaited(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process id names another process here, or none; the host name is the same."""
    monkeypatch.setattr(lock, "RENEW_SECONDS", 1.0)
    here = asdict(this_process()) | {"host": socket.gethostname()}
    elsewhere = here | {"pid": no_process(), "namespace": "pid:[1]"}
    write_lock(folder, **elsewhere)
    renewal = threading.Timer(0.5, write_lock, (folder,), {**elsewhere, "renewed_at": 20.0})
    renewal.start()
    with (
        pytest.raises(InputError, match="another finray process is using it"),
        hold_run_lock(folder, threading.Event(), SILENT),
    ):
        pass
    renewal.join()


def no_process() -> int:
    """An id that no process has."""
    return int(Path("/proc/sys/kernel/pid_max").read_text(encoding="ascii")) + 1


def test_a_process_that_has_the_id_of_a_dead_holder_is_another_one(folder: Folder) -> None:
    here = asdict(this_process())
    write_lock(folder, **here | {"started": here["started"] - 1})
    progress = RecordedProgress()
    with hold_run_lock(folder, threading.Event(), progress) as stale:
        assert stale is not None
    assert progress.statuses == []


def test_a_holder_that_is_killed_and_not_yet_reaped_is_dead(folder: Folder) -> None:
    child = subprocess.Popen(["sleep", "300"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").split()[21])
    write_lock(folder, **asdict(this_process()) | {"pid": child.pid, "started": started})
    with (
        pytest.raises(InputError, match=f"process {child.pid} on "),
        hold_run_lock(folder, threading.Event(), SILENT),
    ):
        pass
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with hold_run_lock(folder, threading.Event(), SILENT) as stale:
        assert stale is not None
    child.wait()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"id": "x"',
        b"[]",
        b'{"id": "x"}',
        b'{"id": "x", "host": "y", "pid": "z", "renewed_at": 0}',
    ],
)
def test_a_half_written_lock_does_not_count(folder: Folder, content: bytes) -> None:
    folder.write(LOCK_FILE, content)
    with hold_run_lock(folder, threading.Event(), SILENT) as stale:
        assert stale is None
    assert not folder.exists(LOCK_FILE)


def test_the_holder_is_notified_when_it_loses_the_lock(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    lost = threading.Event()
    with hold_run_lock(folder, lost, SILENT):
        deadline = time.monotonic() + 300
        while not lost.wait(0.1):  # a renewal may have overwritten it
            assert time.monotonic() < deadline
            write_lock(folder)
    assert folder.exists(LOCK_FILE), "the lock of the other process stays"
