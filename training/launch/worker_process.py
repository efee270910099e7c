"""The program of one worker process, which `local_workers.py` starts.

    python -m finray.training.launch.worker_process

It reads commands from stdin and writes replies to stdout, both as lines of JSON. It loads the
libraries before the first command. When the driver ends, stdin closes: this process then ends
itself and all processes that it started.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import IO, Any, Literal, TypedDict

from ..common.errors import in_one_line
from ..common.imports import uncollected
from ..engine.heartbeat import Heartbeat, Timeout
from ..engine.task import WorkerResult, WorkerTask, repeats_as
from ..models.devices import use
from .network import LOOPBACK, Place, join_group


class Start(TypedDict):
    """The command to train."""

    task: WorkerTask
    place: dict[str, Any]
    """`Place`, as a dictionary."""
    heartbeat: str
    """The file for this worker's heartbeat, which the driver reads."""
    hang_timeout: Timeout


class Failure(TypedDict):
    """A reply instead of a `WorkerResult`: another attempt may succeed."""

    status: Literal["error"]
    error: str
    repeats_as: str | None
    """See `engine.task.repeats_as`."""


STOP_LINE = b"stop\n"
"""The command to save and end."""


class ProcessContext:
    """The context of a worker in a process of this machine.

    Args:
        place: the worker's rank and device.
        stop: set when the driver requests a stop.
        heartbeat: receives the worker's phases.
    """

    on_ray = False
    nodes: tuple[str, ...] = ()

    def __init__(self, place: Place, stop: threading.Event, heartbeat: Heartbeat) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self._stop = stop
        self.heartbeat = heartbeat

    def stop_requested(self) -> bool:
        """True after the driver's stop command."""
        return self._stop.is_set()


def main() -> None:
    """Train once, then wait until the driver ends this process: other ranks may still need it."""
    _leave_signals_to_driver()
    faulthandler.enable()
    commands, reply = _open_channels()
    starts: SimpleQueue[Start] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_read_commands, args=(commands, starts, stop), daemon=True).start()

    try:
        reply(_train(starts, stop))
    except Exception as error:  # noqa: BLE001 - the driver decides what follows
        traceback.print_exc()
        reply(_failure(error))
    threading.Event().wait()


def _failure(error: Exception) -> Failure:
    message = f"{type(error).__name__}: {in_one_line(error)}"
    return Failure(status="error", error=message, repeats_as=repeats_as(error))


def _train(starts: "SimpleQueue[Start]", stop: threading.Event) -> WorkerResult:
    with uncollected():
        from ..engine.worker import run_worker

    start = starts.get()
    place = Place(**start["place"])
    use(place.device)
    with Heartbeat(Path(start["heartbeat"]), start["hang_timeout"]) as heartbeat:
        heartbeat.enter("rendezvous")
        join_group(place, LOOPBACK)
        return run_worker(start["task"], ProcessContext(place, stop, heartbeat))


def _read_commands(
    commands: IO[bytes], starts: "SimpleQueue[Start]", stop: threading.Event
) -> None:
    for line in commands:
        if line == STOP_LINE:
            stop.set()
        else:
            starts.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


def _leave_signals_to_driver() -> None:
    """Ignore signals that the driver receives too: it sends a command.

    Processes that a worker forks, such as a reward function's pool, get the default handlers back,
    so that signals end them.
    """

    def ignore(_: int, __: FrameType | None) -> None:
        """Do nothing. Unlike SIG_IGN, programs that this process executes do not inherit it."""

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ignore) for number in numbers}
    os.register_at_fork(after_in_child=restore)


def _open_channels() -> tuple[IO[bytes], Callable[[WorkerResult | Failure], None]]:
    """The stream of commands, and a function that sends a reply.

    All other code in this process gets an empty stdin, and its stdout goes to stderr.
    """
    commands: IO[bytes] = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    stream: IO[bytes] = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(reply: WorkerResult | Failure) -> None:
        stream.write(json.dumps(reply).encode() + b"\n")
        stream.flush()

    return commands, send


if __name__ == "__main__":
    main()
