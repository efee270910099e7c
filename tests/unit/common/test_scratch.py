"""Temporary folders: those of killed processes are removed by whoever comes next."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from finray.training.common import scratch
from finray.training.common.scratch import ScratchFolder, remove_leftovers, scratch_folder

MAKES = """
import time
from finray.training.common.scratch import ScratchFolder
folder = ScratchFolder("test")
(folder.path / "staged").mkdir()
(folder.path / "staged" / "weights").write_bytes(b"x" * 1000)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, also of child processes."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(scratch, "_SHORT_ROOT", tmp_path / "short")
    return tmp_path


@pytest.fixture
def maker() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that has a folder."""
    child = subprocess.Popen([sys.executable, "-c", MAKES], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    yield child
    child.kill()
    child.communicate()


def test_the_folder_of_a_killed_process_is_removed_by_the_next(
    maker: "subprocess.Popen[bytes]", temporary: Path
) -> None:
    (theirs,) = temporary.iterdir()
    with scratch_folder("run") as ours:
        assert theirs.exists(), "its process still runs"
        maker.kill()
        maker.wait()
        with scratch_folder("other"):
            assert not theirs.exists() and ours.exists()
    assert not list(temporary.iterdir())


def test_what_is_kept_stays(temporary: Path) -> None:
    folder = ScratchFolder("workers")
    (folder.path / "worker-0.txt").write_text("why", encoding="utf-8")
    folder.close(keep=True)
    remove_leftovers()
    assert (folder.path / "worker-0.txt").read_text(encoding="utf-8") == "why"


def test_what_is_not_ours_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of other programs and other users, and what a link leads to."""
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / "finray-scratch-link").symlink_to(elsewhere)
    (temporary / "finray-scratch-file").touch()
    (temporary / "finray-abcdefgh").mkdir()
    with monkeypatch.context() as patch:
        theirs = temporary / "finray-scratch-theirs"
        theirs.mkdir()
        patch.setattr(os, "getuid", lambda: 12345)
        remove_leftovers()
    assert len(list(temporary.iterdir())) == 5
    remove_leftovers()
    assert not theirs.exists() and len(list(temporary.iterdir())) == 4


def test_a_folder_that_is_removed_before_it_is_locked(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may come between; a new one is made then."""
    lock, calls = scratch.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (only,) = temporary.iterdir()
            only.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(scratch.fcntl, "flock", late)
    with scratch_folder("run") as folder:
        assert folder.is_dir() and len(calls) == 2
