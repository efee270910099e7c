"""Runs workers as processes of this machine: without a cluster, Ray would only delay a run.

start → each loads the libraries while the data is prepared → a task → train → each sends its result

If a process ends without a result, or aborts, the others are ended and all start again.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, Self, cast

from ..common.background import Stop
from ..common.progress import Progress
from ..common.scratch import ScratchFolder, remove_leftovers, scratch_folder
from ..common.secrets import redact
from ..common.storage import Folder
from ..config.sections import ScaleSettings
from ..engine.hangs import WatchedProcess, hang_repeats_as, report_hang
from ..engine.heartbeat import Beat, Timeout, Watch, expect_beats
from ..engine.task import WorkerResult, WorkerTask
from ..models.devices import Room
from .network import LOOPBACK, Place, free_port
from .resources import WorkerRequest
from .retries import AttemptEndedError, Launcher
from .worker_process import STOP_LINE, Start

_POLL_SECONDS = 0.1
_LAST_RESULTS_SECONDS = 2.0
"""Time for the other workers to send a result after one failed: they may wait for it for ever."""
_LAST_WRITES_SECONDS = 60.0
"""The same if all workers end for the same reason: rank 0 may still write to a slow storage."""
_END_SECONDS = 30.0

Reply = dict[str, Any] | None
"""A worker's last line: a `WorkerResult` or a `Failure`; None if it ended without one."""


class LocalLauncher(Launcher):
    """Starts the workers of a run as processes.

    As a context manager it starts the processes on entry, and ends them on exit.

    Args:
        scale: the recipe's `scale` section.
        request: the resources of a worker.
        workers: number of workers.
        stop: requested when the run should save and end.
        env: environment variables of the workers.
        verbose: print the workers' output; otherwise it goes to files, kept if workers fail.
        kind: kind of the GPUs, as torch names it: cuda (AMD's too), xpu, mps.
        room: what a worker's GPU offers; None without one.
    """

    def __init__(
        self,
        scale: ScaleSettings,
        request: WorkerRequest,
        workers: int,
        stop: Stop,
        env: dict[str, str],
        verbose: bool,
        kind: str = "cuda",
        room: Room | None = None,
    ) -> None:
        self.stop = stop
        self.room = room
        self.max_failures = scale.max_failures
        self._devices = _devices(request.gpus, workers, kind)
        self._env = {"OMP_NUM_THREADS": str(scale.cpus_per_worker), **os.environ, **env}
        if not request.gpus and scale.gpus_per_worker == 0:
            self._env["CUDA_VISIBLE_DEVICES"] = ""
        self._hang_timeout = scale.hang_timeout
        self._verbose = verbose
        self._group: _WorkerGroup | None = None
        self._logs: ScratchFolder | None = None
        self._keeps_logs = False

    def __enter__(self) -> Self:
        self._logs = ScratchFolder("workers")
        self._group = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None:
            self._group.end()
        if self._logs is not None:
            self._logs.close(keep=self._keeps_logs)
        remove_leftovers()  # of workers that were killed

    def attempt(self, task: WorkerTask) -> WorkerResult:
        """Train until all workers end; every attempt but the first starts new processes."""
        group, self._group = self._group or self._start(), None
        try:
            with scratch_folder("heartbeats") as beats:
                return group.train(task, self.stop, beats, self._hang_timeout)
        except _WorkersFailedError as failure:
            self._keeps_logs = not self._verbose
            assert self._logs is not None
            hint = f" (the workers' output: {self._logs.path})" if self._keeps_logs else ""
            end = AttemptEndedError(str(failure), hint=hint, repeats_as=failure.repeats_as)
            raise end from None
        except KeyboardInterrupt:  # the user may want to find out what hung
            self._keeps_logs = True
            raise
        finally:
            group.end()

    def wait_until_ready(self, progress: Progress) -> None:
        """No-op: this machine is always ready."""

    def _start(self) -> "_WorkerGroup":
        logs = None if self._verbose or self._logs is None else self._logs.path
        return _WorkerGroup(self._devices, self._env, logs)


class _WorkersFailedError(Exception):
    """A worker ended without a result, or with an error.

    Args:
        message: what happened.
        repeats_as: see `AttemptEndedError`.
    """

    def __init__(self, message: str, repeats_as: str | None = None) -> None:
        super().__init__(message)
        self.repeats_as = repeats_as


@dataclass
class _Worker:
    process: "subprocess.Popen[bytes]"
    device: str
    reply: Reply = None

    def send(self, line: bytes) -> None:
        """Send a command; does nothing if the worker has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def close(self) -> None:
        """Close the channel for commands."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # a command that the worker has not read
            self.process.stdin.close()


class _WorkerGroup:
    """The worker processes of one attempt."""

    def __init__(self, devices: list[str], env: dict[str, str], logs: Path | None) -> None:
        self._workers = [
            _Worker(start_process(env, logs and logs / f"worker-{rank}.txt"), device)
            for rank, device in enumerate(devices)
        ]
        self._ended: SimpleQueue[int] = SimpleQueue()
        for rank, worker in enumerate(self._workers):
            reader = threading.Thread(target=self._read_replies, args=(rank, worker), daemon=True)
            reader.start()
            threading.Thread(target=self._watch, args=(rank, worker, reader), daemon=True).start()

    def train(
        self, task: WorkerTask, stop: Stop, beats: Path, hang_timeout: Timeout
    ) -> WorkerResult:
        """Train until all workers have ended, or one has failed or hangs.

        Args:
            task: the run.
            stop: requested when the run should save and end.
            beats: an empty folder for the workers' heartbeats.
            hang_timeout: the setting scale.hang_timeout.

        Raises:
            _WorkersFailedError: another attempt may succeed.
        """
        files = self._send_task(task, beats, hang_timeout)
        watches = [Watch(file) for file in files]
        running = set(range(len(self._workers)))
        is_stopping, deadline = False, math.inf
        while running:
            if stop.requested.is_set() and not is_stopping:
                is_stopping = True
                self._workers[0].send(STOP_LINE)  # rank 0 passes it on, for the same step on all
            try:
                rank = self._ended.get(timeout=_POLL_SECONDS)
            except Empty:
                if time.monotonic() > deadline:
                    break
                for rank in running if deadline == math.inf else ():
                    if (beat := watches[rank].hung()) is not None:
                        self._fail_hung(Folder(task["run"]), files, running, beat)
                continue
            running.discard(rank)
            reply = self._workers[rank].reply
            if not _is_good(reply):
                deadline = min(deadline, time.monotonic() + _seconds_for_others(reply))
        return self._result(sorted(running))

    def end(self) -> None:
        """End the workers and all processes that they started."""
        for worker in self._workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            # A process that waits for a device may stay; it must not block the others.
            with suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            worker.close()

    def _send_task(self, task: WorkerTask, beats: Path, hang_timeout: Timeout) -> list[Path]:
        """Start the training; returns the files of the workers' heartbeats."""
        port, count = free_port(), len(self._workers)
        files = [beats / f"worker-{rank}" for rank in range(count)]
        for rank, worker in enumerate(self._workers):
            expect_beats(files[rank], hang_timeout)
            place = Place(rank, count, rank, count, 0, LOOPBACK, port, worker.device)
            start = Start(
                task=task,
                place=asdict(place),
                heartbeat=str(files[rank]),
                hang_timeout=hang_timeout,
            )
            worker.send(json.dumps(start).encode() + b"\n")
        return files

    def _fail_hung(self, run: Folder, files: list[Path], running: set[int], beat: Beat) -> NoReturn:
        watched = {
            rank: WatchedProcess(self._workers[rank].process.pid, files[rank]) for rank in running
        }
        message = report_hang(run, watched, beat)
        raise _WorkersFailedError(message, hang_repeats_as(message))

    def _read_replies(self, rank: int, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        with worker.process.stdout as replies:
            for line in replies:
                if line.startswith(b'{"status"'):  # not what a library prints while it loads
                    worker.reply = json.loads(line)
                    self._ended.put(rank)

    def _watch(self, rank: int, worker: _Worker, reader: threading.Thread) -> None:
        """Put the rank into the queue when its process ends; children may keep the pipe open."""
        worker.process.wait()
        reader.join(_LAST_RESULTS_SECONDS)
        self._ended.put(rank)

    def _result(self, silent: list[int]) -> WorkerResult:
        """The attempt's result: the original cause, not the failures that it causes on others.

        Args:
            silent: ranks that have neither replied nor ended.
        """
        replies = [worker.reply for worker in self._workers]
        for reply in replies:
            if reply is not None and reply["status"] == "retry":
                return cast(WorkerResult, reply)
        for rank, worker in enumerate(self._workers):
            if worker.reply is None and rank not in silent:
                raise _WorkersFailedError(f"worker {rank} {_ending(worker.process.returncode)}")
        for rank, reply in enumerate(replies):
            if reply is not None and reply["status"] == "error":
                message = redact(f"worker {rank} failed: {reply['error']}")
                raise _WorkersFailedError(message, reply["repeats_as"])
        bad = [reply for reply in replies if reply is not None and not _is_good(reply)]
        return cast(WorkerResult, (bad or replies)[0])


def start_process(env: dict[str, str], log: Path | None) -> "subprocess.Popen[bytes]":
    """Start a worker process; its stderr goes into the log, without one to this process's."""
    # -P: a file in the current folder must not be imported instead of a library.
    command = [sys.executable, "-P", "-m", "finray.training.launch.worker_process"]
    pipe = subprocess.PIPE
    with log.open("ab") if log is not None else nullcontext() as stream:
        # Its own process group: Ctrl-C does not reach it, and its children end with it.
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stream, env=env, process_group=0
        )


def _devices(gpus: float, workers: int, kind: str) -> list[str]:
    """Each worker's torch device, by rank."""
    if not gpus or kind == "mps":  # of which there is one
        return ["mps" if gpus else "cpu"] * workers
    return [f"{kind}:{rank}" for rank in range(workers)]


def _seconds_for_others(reply: Reply) -> float:
    """Seconds that the other workers get after this reply: few if they may wait for this one."""
    if reply is None or reply["status"] == "error":
        return _LAST_RESULTS_SECONDS
    retry = reply.get("retry")
    others_may_wait = retry is not None and retry["cause"] in ("memory", "data", "checkpoint")
    return _LAST_RESULTS_SECONDS if others_may_wait else _LAST_WRITES_SECONDS


def _is_good(reply: Reply) -> bool:
    return reply is not None and reply["status"] in ("finished", "stopped")


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
