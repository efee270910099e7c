"""One driver at a time: a lock file in the run's folder, which its holder renews.

Two drivers of the same run would overwrite each other's checkpoints. A lock that is not renewed,
or whose process no longer exists, is stale: its driver died.
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
"""Much longer than a renewal, because a storage may be unreachable for a while."""


@dataclass(frozen=True)
class Lock:
    """The driver process that holds a run."""

    id: str
    host: str
    pid: int
    renewed_at: float
    """Seconds since the epoch, by the holder's clock."""

    def __str__(self) -> str:
        age = formatting.duration(time.time() - self.renewed_at)
        return f"process {self.pid} on {self.host}, last heartbeat {age} ago"

    @property
    def is_local(self) -> bool:
        """True if the holder is, or was, a process on this machine."""
        return self.host == socket.gethostname()


@contextmanager
def hold_run_lock(
    folder: Folder, lost: threading.Event, progress: Progress
) -> Iterator[Lock | None]:
    """Hold the folder's lock; yields the stale lock that it replaces, or None.

    Args:
        folder: the run's folder, which exists.
        lost: set if another driver takes the lock because this one did not renew it in time.
        progress: receives a status while this process waits for a heartbeat of another holder.

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
        if _is_own(folder, own):
            folder.delete(LOCK_FILE)


def _take(folder: Folder, own: Lock, progress: Progress) -> Lock | None:
    existing = _read(folder)
    if existing is not None and _is_alive(folder, existing, progress):
        raise InputError(
            f"{folder}: another finray process is using it ({_read(folder) or existing}); "
            "wait until it ends, or stop it"
        )
    if existing is None and folder.local is not None and not folder.exists(LOCK_FILE):
        return None if _link(folder, own) else _take(folder, own, progress)
    folder.write(LOCK_FILE, _encode(own))
    return existing if _is_own(folder, own) else _take(folder, own, progress)


def _is_alive(folder: Folder, existing: Lock, progress: Progress) -> bool:
    """True if the lock's holder is still running.

    On this machine, the process must exist. On another machine, the holder must renew its lock
    while this function waits, because the clocks of two machines may differ.
    """
    age = time.time() - existing.renewed_at
    if existing.is_local:
        return age < STALE_SECONDS and _exists(existing.pid)
    wait_seconds = max(2 * RENEW_SECONDS, STALE_SECONDS - age)
    progress.status(
        f"waiting up to {wait_seconds:.0f} s for a heartbeat of the lock's holder ({existing})"
    )
    end = time.monotonic() + wait_seconds
    while time.monotonic() < end:
        time.sleep(RENEW_SECONDS / 10)
        now = _read(folder)
        if now is None or now != existing:
            return now is not None
    return False


def _link(folder: Folder, own: Lock) -> bool:
    """Create the lock file on a disk; False if another driver created it first."""
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
            if not _is_own(folder, own):
                lost.set()
                return
            renewed = Lock(own.id, own.host, own.pid, time.time())
            folder.write(LOCK_FILE, _encode(renewed))
        except OSError:
            continue  # the storage is unreachable: the next renewal tries again


def _is_own(folder: Folder, own: Lock) -> bool:
    existing = _read(folder)
    return existing is not None and existing.id == own.id


def _read(folder: Folder) -> Lock | None:
    """The lock; None if there is none, or if a process died while it wrote the file."""
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
