"""One driver at a time: a lock in the run's folder that shows signs of life.

Two drivers of one run would write over each other's checkpoints. The holder renews its lock; a
lock that is not renewed, or whose process is gone, belonged to a driver that died.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from . import figures
from .errors import InputError
from .storage import Folder

LOCK_FILE = "lock.json"
RENEW_SECONDS = 15.0
STALE_SECONDS = 90.0
"""Longer than a renewal by far, as the clocks of two machines may differ."""


@dataclass(frozen=True)
class Lock:
    """Who works on a run."""

    id: str
    host: str
    pid: int
    renewed_at: float
    """Seconds since the epoch, by the holder's clock."""

    def __str__(self) -> str:
        silent = figures.duration(time.time() - self.renewed_at)
        return f"process {self.pid} on {self.host}, whose last sign of life is {silent} old"

    def is_alive(self) -> bool:
        """Whether its holder still works, as far as can be told from here."""
        if time.time() - self.renewed_at > STALE_SECONDS:
            return False
        return self.host != socket.gethostname() or _exists(self.pid)


@contextmanager
def held(folder: Folder, lost: threading.Event) -> Iterator[Lock | None]:
    """Hold the folder's lock; yields the stale lock that was taken over, if there was one.

    Args:
        folder: the run's folder, which exists.
        lost: set where another driver took the lock, after this one was silent for long.

    Raises:
        InputError: somebody else works on the run.
    """
    own = Lock(uuid.uuid4().hex, socket.gethostname(), os.getpid(), time.time())
    stale = _take(folder, own)
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(folder, own, done, lost), daemon=True)
    renewer.start()
    try:
        yield stale
    finally:
        done.set()
        renewer.join()
        if _is_ours(folder, own):
            folder.delete(LOCK_FILE)


def _take(folder: Folder, own: Lock) -> Lock | None:
    found = _read(folder)
    if found is not None and found.is_alive():
        raise InputError(
            f"{folder}: another finray works on this run ({found}); wait for it, or stop it. A "
            f"lock whose holder died is taken over after {STALE_SECONDS:.0f} s."
        )
    if found is None and folder.local is not None and not folder.exists(LOCK_FILE):
        return None if _link(folder, own) else _take(folder, own)
    folder.write(LOCK_FILE, _encode(own))
    return found if _is_ours(folder, own) else _take(folder, own)


def _link(folder: Folder, own: Lock) -> bool:
    """Of two drivers that start at once on a disk, one makes the file, whole."""
    assert folder.local is not None
    draft = f"{LOCK_FILE}.{own.id}"
    folder.write(draft, _encode(own))
    try:
        os.link(folder.local / draft, folder.local / LOCK_FILE)
    except FileExistsError:
        return False
    finally:
        folder.delete(draft)
    return True


def _renew(folder: Folder, own: Lock, done: threading.Event, lost: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        try:
            if not _is_ours(folder, own):
                lost.set()
                return
            renewed = Lock(own.id, own.host, own.pid, time.time())
            folder.write(LOCK_FILE, _encode(renewed))
        except OSError:
            continue  # a storage that is away for a moment: the next renewal tries again


def _is_ours(folder: Folder, own: Lock) -> bool:
    found = _read(folder)
    return found is not None and found.id == own.id


def _read(folder: Folder) -> Lock | None:
    """The lock; None where there is none, or only what a dying process left of one."""
    try:
        return Lock(**json.loads(folder.read(LOCK_FILE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _encode(lock: Lock) -> bytes:
    return json.dumps(asdict(lock)).encode()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
