"""Workers as processes of this machine: where a run has no cluster, Ray would only make it wait.

start → each loads the libraries, while the data is prepared → a job → train → each tells how
it ended; a process that ends untold, or gives up, ends the others, and all start anew
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self, cast

from ..common.errors import RunError
from ..common.secrets import redact
from ..common.stop import Stop
from ..common.storage import Folder
from ..config.sections import ScaleSettings
from ..engine.task import Job, Outcome
from ..records.run_folder import CHECKPOINTS_FOLDER
from .elastic import Patience
from .network import LOOPBACK, Place, free_port
from .resources import Demand
from .worker_process import STOP_LINE, Start

_POLL_SECONDS = 0.1
_LAST_WORDS_SECONDS = 2.0
"""For the others to tell how they ended, once one failed: they may wait for it for ever."""
_LAST_WRITES_SECONDS = 60.0
"""The same, once one ended as all do: rank 0 may still write into a slow storage."""
_END_SECONDS = 30.0

Answer = dict[str, Any] | None
"""What a worker told last: an `Outcome` or a `Failure`; None of one that ended without a word."""


class _WorkersFailedError(Exception):
    """Ends an attempt; another one may be made."""


class Processes:
    """The workers of one run; as a context, they are started at once and ended at the end.

    Args:
        scale: the run's.
        wanted: what a worker holds.
        workers: how many there are.
        env: environment variables for them.
        verbose: pass on what they print; else it is kept until it is known that all is well.
    """

    def __init__(
        self, scale: ScaleSettings, wanted: Demand, workers: int, env: dict[str, str], verbose: bool
    ) -> None:
        self._scale = scale
        self._wanted = wanted
        self._count = workers
        self._env = {"OMP_NUM_THREADS": str(scale.cpus_per_worker), **os.environ, **env}
        self._verbose = verbose
        self._group: _Group | None = None
        self._keeps_logs = False

    def __enter__(self) -> Self:
        self._logs = Path(tempfile.mkdtemp(prefix="finray-workers-"))
        self._group = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            self._group.end()
        if not self._keeps_logs:
            shutil.rmtree(self._logs)

    def launch(self, job: Job, stop: Stop, tell: Callable[[str], None]) -> Outcome:
        """Train, with new processes after each failure.

        Args:
            job: what the workers are told.
            stop: a request to save and end.
            tell: called with why the workers start anew.

        Raises:
            RunError: they failed more often than `max_failures`, or when they should have saved.
        """
        stop.armed = True
        patience = Patience(Folder(job["run"]) / CHECKPOINTS_FOLDER, self._scale.max_failures)
        while not stop.requested.is_set():
            try:
                return self._attempt(job, stop)
            except _WorkersFailedError as failure:
                told = f"{failure}{self._tell_logs()}"
                if stop.requested.is_set() or not patience.bears():
                    raise RunError(told) from None
                tell(f"starting the workers anew: {told}")
                job = cast(Job, {**job, "cause": str(failure)})
        return Outcome(status="stopped", error=None, exit_code=130)

    def _attempt(self, job: Job, stop: Stop) -> Outcome:
        group, self._group = self._group or self._start(), None
        try:
            return group.train(job, stop)
        except KeyboardInterrupt:  # somebody who leaves at once may want to know what hung
            self._keeps_logs = True
            raise
        finally:
            group.end()

    def _tell_logs(self) -> str:
        self._keeps_logs = not self._verbose
        return f" (what the workers printed: {self._logs})" if self._keeps_logs else ""

    def _start(self) -> "_Group":
        devices = ["cpu"] * self._count
        env = self._env
        if self._wanted.gpus:
            devices = [f"cuda:{_gpu(rank, self._wanted.gpus)}" for rank in range(self._count)]
        elif self._scale.gpus_per_worker == 0:
            env = {**env, "CUDA_VISIBLE_DEVICES": ""}
        return _Group(devices, env, None if self._verbose else self._logs)


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    device: str
    answer: Answer = None

    def order(self, line: bytes) -> None:
        """One that has ended hears nothing more; what it told is known."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def close(self) -> None:
        """There are no orders any more."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # one that it did not hear
            self.process.stdin.close()


class _Group:
    """Processes that train one attempt, and are ended then."""

    def __init__(self, devices: list[str], env: dict[str, str], logs: Path | None) -> None:
        self._workers = [
            _Worker(_start_process(env, logs and logs / f"worker-{rank}.txt"), device)
            for rank, device in enumerate(devices)
        ]
        self._ends: SimpleQueue[int] = SimpleQueue()
        for rank, worker in enumerate(self._workers):
            ear = threading.Thread(target=self._hear, args=(rank, worker), daemon=True)
            ear.start()
            threading.Thread(target=self._watch, args=(rank, worker, ear), daemon=True).start()

    def train(self, job: Job, stop: Stop) -> Outcome:
        """Until all workers have ended, or one of them otherwise than by finishing.

        Raises:
            _WorkersFailedError: one failed as another attempt may not.
        """
        self._begin(job)
        missing = set(range(len(self._workers)))
        is_told, patience = False, math.inf
        while missing:
            if stop.requested.is_set() and not is_told:
                is_told = True
                self._workers[0].order(STOP_LINE)  # which tells the others, at the same step
            try:
                rank = self._ends.get(timeout=_POLL_SECONDS)
            except Empty:
                if time.monotonic() > patience:
                    break
                continue
            missing.discard(rank)
            answer = self._workers[rank].answer
            if not _is_good(answer):
                patience = min(patience, time.monotonic() + _seconds_for_others(answer))
        return self._judge(sorted(missing))

    def end(self) -> None:
        """And all that they started: what they have to say was said."""
        for worker in self._workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            # One that waits for a device may stay: it must not keep the others.
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            worker.close()

    def _begin(self, job: Job) -> None:
        port, count = free_port(), len(self._workers)
        for rank, worker in enumerate(self._workers):
            place = Place(rank, count, rank, count, 0, LOOPBACK, port, worker.device)
            worker.order(json.dumps(Start(job=job, place=asdict(place))).encode() + b"\n")

    def _hear(self, rank: int, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as answers:
            for line in answers:
                if line.startswith(b'{"status"'):  # what is printed before the worker's first line
                    worker.answer = json.loads(line)
                    self._ends.put(rank)

    def _watch(self, rank: int, worker: _Worker, ear: threading.Thread) -> None:
        """Its end; a process that it started may hold its pipe open after it."""
        worker.process.wait()
        ear.join(_LAST_WORDS_SECONDS)
        self._ends.put(rank)

    def _judge(self, unheard: list[int]) -> Outcome:
        """How the attempt ended: by what ended first, not by what that did to the others."""
        told = [worker.answer for worker in self._workers]
        for answer in told:
            if answer is not None and answer["status"] == "restart":
                return cast(Outcome, answer)
        for rank, worker in enumerate(self._workers):
            if worker.answer is None and rank not in unheard:
                raise _WorkersFailedError(f"worker {rank} {_ending(worker.process.returncode)}")
        for rank, answer in enumerate(told):
            if answer is not None and answer["status"] == "error":
                raise _WorkersFailedError(redact(f"worker {rank} failed: {answer['error']}"))
        bad = [answer for answer in told if answer is not None and not _is_good(answer)]
        return cast(Outcome, (bad or told)[0])


def _start_process(env: dict[str, str], log: Path | None) -> "subprocess.Popen[bytes]":
    # -P: a file of the current folder must not be taken for a library.
    command = [sys.executable, "-P", "-m", "finray.training.launch.worker_process"]
    pipe = subprocess.PIPE
    with log.open("ab") if log is not None else nullcontext() as stream:
        # A group of its own, which a terminal's Ctrl-C does not reach, and which ends as one.
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stream, env=env, process_group=0
        )


def _gpu(rank: int, each: float) -> int:
    """A worker's GPU, where each takes so many or such a part of one."""
    return rank * math.ceil(each) if each >= 1 else rank // int(1 / each + 1e-9)


def _seconds_for_others(answer: Answer) -> float:
    """Whether they will all end by themselves, as this one did."""
    if answer is None or answer["status"] == "error":
        return _LAST_WORDS_SECONDS
    restart = answer.get("restart")
    waits = restart is not None and restart["cause"] == "memory"
    return _LAST_WORDS_SECONDS if waits else _LAST_WRITES_SECONDS


def _is_good(answer: Answer) -> bool:
    return answer is not None and answer["status"] in ("finished", "stopped")


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
