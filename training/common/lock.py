"""One driver at a time: a lock file in the run's folder, which its holder renews.

Two drivers of the same run would overwrite each other's checkpoints. A lock is stale if its
holder's process has ended, or, where that process is not visible from here, if it is not renewed
while this driver waits. Clocks of two machines are never compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from .errors import InputError
from .processes import Process, this_process
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
    """The holder's clock; only its changes count."""
    boot: str = ""
    namespace: str = ""
    started: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def holder(self) -> Process:
        """The holder's process."""
        return Process(self.pid, self.boot, self.namespace, self.started)


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
    own = Lock(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        renewed_at=time.time(),
        **asdict(this_process()),
    )
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


def holder_of(folder: Folder) -> str | None:
    """The process of this machine that holds a folder's lock, as text; None if none does.

    A holder that is not visible from here is no answer: `hold_run_lock` waits for its heartbeat.
    """
    lock = _read(folder)
    return f"{lock}" if lock is not None and lock.holder.is_running() else None


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

    A process that is visible from here exists or does not. Any other must renew its lock while
    this function waits.
    """
    is_running = existing.holder.is_running()
    if is_running is not None:
        return is_running
    wait_seconds = _seconds_to_stale(folder)
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


def _seconds_to_stale(folder: Folder) -> float:
    """Seconds to wait for a renewal: at least two renewals, and less the older the lock is.

    Its age is the difference of two times by the storage's own clock.
    """
    probe = f"{LOCK_FILE}.{uuid.uuid4().hex}"
    folder.write(probe, b"")
    try:
        written, now = folder.modified(LOCK_FILE), folder.modified(probe)
    finally:
        folder.delete(probe)
    age = 0.0 if written is None or now is None else now - written
    return min(max(2 * RENEW_SECONDS, STALE_SECONDS - age), STALE_SECONDS)


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
            folder.write(LOCK_FILE, _encode(replace(own, renewed_at=time.time())))
        except OSError:
            continue  # the storage is unreachable: the next renewal tries again


def _is_own(folder: Folder, own: Lock) -> bool:
    existing = _read(folder)
    return existing is not None and existing.id == own.id


def _read(folder: Folder) -> Lock | None:
    """The lock; None if there is none, or if a process died while it wrote the file."""
    try:
        lock = Lock(**json.loads(folder.read(LOCK_FILE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return lock if isinstance(lock.pid, int) else None


def _encode(lock: Lock) -> bytes:
    return json.dumps(asdict(lock)).encode()
