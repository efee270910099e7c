"""The lock of a run's folder: it has one holder, and a stale lock is taken over."""

import json
import os
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
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    write_lock(folder, renewed_at=time.time() - lock.STALE_SECONDS - 1)
    progress = RecordedProgress()
    with hold_run_lock(folder, threading.Event(), progress) as stale:
        assert stale is not None and stale.id == "other"
    assert "process 1 on elsewhere" in progress.statuses[0]


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


@pytest.mark.parametrize("content", [b"", b'{"id": "x"', b"[]", b'{"id": "x"}'])
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
        deadline = time.monotonic() + 10
        while not lost.wait(0.1):  # a renewal may have overwritten it
            assert time.monotonic() < deadline
            write_lock(folder)
    assert folder.exists(LOCK_FILE), "the lock of the other process stays"
