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

from . import formatting
from .errors import InputError
from .progress import Progress
from .storage import Folder

LOCK_FILE = "lock.json"
RENEW_SECONDS = 15.0
STALE_SECONDS = 90.0
"""Longer than a renewal by far: a storage may be away for a while."""


@dataclass(frozen=True)
class Lock:
    """Who works on a run."""

    id: str
    host: str
    pid: int
    renewed_at: float
    """Seconds since the epoch, by the holder's clock."""

    def __str__(self) -> str:
        silent = formatting.duration(time.time() - self.renewed_at)
        return f"process {self.pid} on {self.host}, whose last sign of life is {silent} old"

    @property
    def is_here(self) -> bool:
        """Whether its holder is, or was, a process of this machine."""
        return self.host == socket.gethostname()


@contextmanager
def hold_run_lock(
    folder: Folder, lost: threading.Event, progress: Progress
) -> Iterator[Lock | None]:
    """Hold the folder's lock; yields the stale lock that was taken over, if there was one.

    Args:
        folder: the run's folder, which exists.
        lost: set if another driver takes the lock, after this one was silent for long.
        progress: receives what is waited for.

    Raises:
        InputError: another process holds the lock.
    """
    own = Lock(uuid.uuid4().hex, socket.gethostname(), os.getpid(), time.time())
    stale = _take(folder, own, progress)
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


def _take(folder: Folder, own: Lock, progress: Progress) -> Lock | None:
    found = _read(folder)
    if found is not None and _is_alive(folder, found, progress):
        raise InputError(
            f"{folder}: another finray process runs it ({_read(folder) or found}); wait for it, "
            "or stop it"
        )
    if found is None and folder.local is not None and not folder.exists(LOCK_FILE):
        return None if _link(folder, own) else _take(folder, own, progress)
    folder.write(LOCK_FILE, _encode(own))
    return found if _is_ours(folder, own) else _take(folder, own, progress)


def _is_alive(folder: Folder, found: Lock, progress: Progress) -> bool:
    """Whether a lock's holder still works.

    A process of this machine is looked for. One of another machine is alive if it renews its lock:
    this is watched, as the clocks of two machines may differ.
    """
    age = time.time() - found.renewed_at
    if found.is_here:
        return age < STALE_SECONDS and _exists(found.pid)
    patience = max(2 * RENEW_SECONDS, STALE_SECONDS - age)
    progress.status(f"waiting up to {patience:.0f}s for a sign of life of {found}")
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(RENEW_SECONDS / 10)
        now = _read(folder)
        if now is None or now != found:
            return now is not None
    return False


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
