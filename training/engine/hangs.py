"""What is reported of a hanging worker: a message, and the stacks of all workers that are near."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..common.processes import is_stopped
from ..common.storage import Folder
from ..records.run_folder import STACKS_FOLDER
from .heartbeat import STACKS_SIGNAL, Beat, read_beat, stacks_file

STOPPED = "is stopped, by SIGSTOP or a debugger"
_STACKS_SECONDS = 3.0
_POLL_SECONDS = 0.1
_WRITE_SECONDS = 30.0
"""Time limit for writing the stacks: a storage that hangs must not block this process."""


@dataclass(frozen=True)
class WatchedProcess:
    """A worker's process and the file of its beats."""

    pid: int
    file: Path


def report_hang(run: Folder, workers: Mapping[int, WatchedProcess], beat: Beat) -> str:
    """Write the stacks of all workers into the run's folder; returns the message for the user.

    Args:
        run: the run's folder.
        workers: the workers that train on this machine, by rank.
        beat: the last sign of the one that hangs.
    """
    stopped = sorted(rank for rank, worker in workers.items() if is_stopped(worker.pid))
    message = f"{beat} did not end within {beat.limit:.0f} s"
    if stopped:
        message = f"worker {stopped[0]} {STOPPED}: {message}"
    stacks = _stacks_of(workers)
    texts = {
        rank: f"{message}\n\n{stacks.get(rank) or 'This worker cannot give its stacks.'}\n".encode()
        for rank in workers
    }
    names = _write(run, beat.step, texts)
    if len(names) == 1:
        message += f"; {run / names[0]} shows where"
    elif names:
        message += f"; {', '.join(names)} in {run} show where each worker waits"
    return f"{message}. If it really takes so long, increase scale.hang_timeout"


def hang_files(run: Folder) -> set[str]:
    """Names of the stacks that hanging workers left in the run's folder."""
    return set((run / STACKS_FOLDER).names())


def hang_message(run: Folder, name: str) -> str:
    """The message of `report_hang` in a file of stacks."""
    return (run / STACKS_FOLDER).read(name).decode("utf-8", "replace").partition("\n")[0]


def hang_repeats_as(message: str) -> str | None:
    """A text that is equal if the same phase hangs again; None if a restart may help."""
    return None if STOPPED in message else message.partition(" did not end ")[0]


def _stacks_of(workers: Mapping[int, WatchedProcess]) -> dict[int, str]:
    """The stacks of each worker's threads; empty for one that cannot give them."""
    files = {}
    for rank, worker in workers.items():
        file = stacks_file(worker.file)
        # Without the file the process does not handle the signal yet.
        if file.exists() and not is_stopped(worker.pid) and read_beat(worker.file).count:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, STACKS_SIGNAL)
            files[rank] = file
    sizes: dict[int, int] = {}
    deadline = time.monotonic() + _STACKS_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        before, sizes = sizes, {rank: file.stat().st_size for rank, file in files.items()}
        if before == sizes and all(sizes.values()):
            break
    return {rank: file.read_text("utf-8", "replace") for rank, file in files.items()}


def _write(run: Folder, step: int, texts: Mapping[int, bytes]) -> list[str]:
    """Write each worker's stacks; returns the names of the files that are written in time."""
    names: list[str] = []

    def write() -> None:
        with suppress(OSError):
            (run / STACKS_FOLDER).create()
            for rank, content in texts.items():
                name = _new_name(run, f"{STACKS_FOLDER}/rank-{rank}-step-{step}")
                run.write(name, content)
                names.append(name)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)
    return names


def _new_name(run: Folder, stem: str) -> str:
    """A name that no file has, as a step may hang again after a restart."""
    number = 1
    while run.exists(name := f"{stem}{f'-{number}' if number > 1 else ''}.txt"):
        number += 1
    return name
