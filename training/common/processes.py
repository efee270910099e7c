"""Identity of a process on this machine, by which its end is noticed.

A process id is used again after its process has ended, and names other processes in another PID
namespace (a container). With the boot, the namespace and the start time it is unique.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_START_FIELD = 19
"""Position of the start time in /proc/PID/stat, counted from the state behind the name."""


@dataclass(frozen=True)
class Process:
    """One process, on one boot of one machine."""

    pid: int
    boot: str
    """Id of the machine's boot; empty where the system does not tell (not Linux)."""
    namespace: str
    """The PID namespace in which `pid` counts."""
    started: int
    """Clock ticks from the boot to the start of the process."""

    def is_running(self) -> bool | None:
        """True or False for a process that is visible from here; None for any other."""
        here = this_process()
        if not here.boot or (self.boot, self.namespace) != (here.boot, here.namespace):
            return None
        try:
            with suppress(PermissionError):  # another user's, which exists
                os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        stat = _stat(self.pid)
        if stat is None:  # ended just now, or hidden from this user
            return None
        return stat[0] != "Z" and int(stat[_START_FIELD]) == self.started


def this_process() -> Process:
    """The identity of the calling process."""
    pid = os.getpid()
    stat = _stat(pid)
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (_PROC / "self/ns/pid").readlink().name
    except FileNotFoundError:
        return Process(pid, "", "", 0)
    return Process(pid, boot, namespace, 0 if stat is None else int(stat[_START_FIELD]))


def is_stopped(pid: int) -> bool:
    """True if a process is stopped by a signal (SIGSTOP) or by a debugger."""
    stat = _stat(pid)
    return stat is not None and stat[0] in "Tt"


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
