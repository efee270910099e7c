"""One worker of a run in a process of its own, as `processes.py` starts it.

    python -m finray.training.worker_process

Orders come in through stdin, answers leave through what was stdout, both as lines of JSON. The
libraries are loaded before there is an order. A driver that is gone has closed its end of stdin:
then this process ends too.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import IO, Any, Literal, TypedDict

from .errors import RunError, last_line
from .job import Job, Outcome
from .network import LOOPBACK, Place, join_group
from .session import ProcessSession


class Start(TypedDict):
    """An order to train."""

    job: Job
    place: dict[str, Any]
    """`Place`, as a dictionary."""


class Failure(TypedDict):
    """An answer in the place of an `Outcome`."""

    status: Literal["error"]
    error: str


STOP_LINE = b"stop\n"
"""The order to save and end."""


def main() -> None:
    """Train once; the process then waits until the driver ends it, as others may still need it."""
    # The driver, which has them too, tells what is to be done about them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    answer = _answers()
    starts: SimpleQueue[Start] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(starts, stop), name="orders", daemon=True).start()

    def fail(told: str) -> None:
        answer(Failure(status="error", error=told))

    try:
        answer(_train(starts, stop, fail))
    except Exception as error:  # noqa: BLE001 - the driver decides what is done about it
        traceback.print_exc()
        fail(f"{type(error).__name__}: {last_line(error)}")
    threading.Event().wait()


def _train(
    starts: "SimpleQueue[Start]", stop: threading.Event, fail: Callable[[str], None]
) -> Outcome:
    import torch

    from .loop import run_worker

    start = starts.get()
    place = Place(**start["place"])
    if place.device.startswith("cuda"):
        torch.cuda.set_device(place.device)
    join_group(place, LOOPBACK)
    return run_worker(start["job"], ProcessSession(place.rank, place.world_size, stop, fail))


def _listen(starts: "SimpleQueue[Start]", stop: threading.Event) -> None:
    for line in sys.stdin.buffer:
        if line == STOP_LINE:
            stop.set()
        else:
            starts.put(json.loads(line))
    os._exit(RunError.exit_code)


def _answers() -> Callable[[Outcome | Failure], None]:
    """What sends an answer; whatever else is printed goes to stderr from here on."""
    stream: IO[bytes] = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(told: Outcome | Failure) -> None:
        stream.write(json.dumps(told).encode() + b"\n")
        stream.flush()

    return answer


if __name__ == "__main__":
    main()
