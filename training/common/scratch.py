"""Folders for temporary files: one place that makes them, so that none outlives its process long.

The process that makes a folder holds a lock on it, which the kernel releases when the process ends,
whatever the cause. Whoever makes the next one on this machine removes those whose lock is free.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "finray-scratch-"
_SHORT_ROOT = Path("/tmp")
_LONGEST_ROOT = 12
_KEEP = ".keep"
"""In a folder that stays, as its files are for the user."""


class ScratchFolder:
    """A temporary folder of this process.

    Args:
        purpose: a word in the folder's name.
        is_short: its path has at most 40 bytes, as paths of sockets are limited.
    """

    def __init__(self, purpose: str, is_short: bool = False) -> None:
        remove_leftovers()
        root, *others = _roots()
        if is_short and others and len(os.fsencode(root)) > _LONGEST_ROOT:
            root = others[0]
        self.path, self._lock = _make(f"{_PREFIX}{purpose}-", root)

    def close(self, keep: bool = False) -> None:
        """Delete the folder, or leave it to the user."""
        if keep:
            (self.path / _KEEP).touch()
        else:
            # What cannot be deleted now, the next process removes.
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


@contextmanager
def scratch_folder(purpose: str, is_short: bool = False) -> Iterator[Path]:
    """A temporary folder for as long as the context lasts; arguments as of `ScratchFolder`."""
    folder = ScratchFolder(purpose, is_short)
    try:
        yield folder.path
    finally:
        folder.close()


def remove_leftovers() -> None:
    """Remove this user's temporary folders whose process has ended."""
    for root in _roots():
        for path in root.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # another process removes it, or it is another user's
                _remove_if_left(path)


def _roots() -> list[Path]:
    """The folder for temporary files, and the usual one with a short path where that differs."""
    return list(dict.fromkeys((Path(tempfile.gettempdir()), _SHORT_ROOT)))


def _make(prefix: str, root: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            lock = _open(path)
        except FileNotFoundError:  # another process removed it before it was opened
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)  # another process removed it before it was locked


def _remove_if_left(path: Path) -> None:
    lock = _open(path)
    try:
        if os.fstat(lock).st_uid == os.getuid() and not (path / _KEEP).exists():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
    finally:
        os.close(lock)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
