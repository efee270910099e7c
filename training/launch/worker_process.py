"""One worker of a run in a process of its own, as `processes.py` starts it.

    python -m finray.training.launch.worker_process

Orders come in through what was stdin, answers leave through what was stdout, both as lines of JSON.
The libraries are loaded before there is an order. A driver that is gone has closed its end: then
this process ends, with all that it started.
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
from types import FrameType
from typing import IO, Any, Literal, TypedDict

from ..common.errors import InputError, last_line
from ..engine.context import ProcessSession
from ..engine.task import Job, Outcome
from .network import LOOPBACK, Place, join_group


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
    _leave_signals_to_driver()
    faulthandler.enable()
    orders, answer = _channels()
    starts: SimpleQueue[Start] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(orders, starts, stop), daemon=True).start()

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

    from ..engine.worker import run_worker

    start = starts.get()
    place = Place(**start["place"])
    if place.device.startswith("cuda"):
        torch.cuda.set_device(place.device)
    elif torch.cuda.is_available():
        told = (
            "torch finds a GPU here and nvidia-smi none; set scale.gpus_per_worker=0 to train on "
            "the CPU, or give --address local: Ray knows other makers' GPUs"
        )
        return Outcome(status="failed", error=told, exit_code=InputError.exit_code)
    join_group(place, LOOPBACK)
    return run_worker(start["job"], ProcessSession(place.rank, place.world_size, stop, fail))


def _listen(orders: IO[bytes], starts: "SimpleQueue[Start]", stop: threading.Event) -> None:
    for line in orders:
        if line == STOP_LINE:
            stop.set()
        else:
            starts.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


def _leave_signals_to_driver() -> None:
    """It has them too, where all of a job's processes are told to end, and tells what to do.

    Not so for what a worker starts, such as a reward function's pool, which is ended by signals.
    """

    def leave(_: int, __: FrameType | None) -> None:
        """Whoever is executed anew has the default again."""

    def take() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    os.register_at_fork(after_in_child=take)


def _channels() -> tuple[IO[bytes], Callable[[Outcome | Failure], None]]:
    """Where orders come from, and what sends an answer.

    For all others stdin is empty, and what is printed goes to stderr.
    """
    orders: IO[bytes] = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    stream: IO[bytes] = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(told: Outcome | Failure) -> None:
        stream.write(json.dumps(told).encode() + b"\n")
        stream.flush()

    return orders, answer


if __name__ == "__main__":
    main()
