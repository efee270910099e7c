"""A worker of two is killed at a random moment, 20 times: time lost, steps repeated, result.

Once as processes of this machine, once as Ray Train's workers. Every run has dropout and saves
every 5 steps. A kill's moment and victim are drawn from its number. The result must be that of an
undisturbed run bit for bit, for both kinds of workers.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import Figure, NotComparable, Target, conclude, finray_command, parse_options, scratch
from start import POLL_SECONDS, QUICK, make_inputs, start

STEPS, EVERY = 60, 5
LONGEST_WAIT = 600.0
KINDS = {"processes": (), "Ray Train": ("--address", "local")}
MARKS = ("finray.training.launch.worker_process", "RayTrainWorker")
"""Parts of a worker's command line, by which workers are recognised."""


@dataclass(frozen=True)
class KilledRun:
    """One run in which a worker was killed."""

    start: float
    """Seconds from the command to the first step."""
    recovery: float
    """Seconds from the kill to the next step."""
    repeated: int
    """Steps that were trained twice."""


class Run:
    """`finray train` with two workers."""

    def __init__(self, folder: Path, name: str, kind: str, threads: int) -> None:
        self.folder = folder / "runs" / name
        shutil.rmtree(self.folder, ignore_errors=True)
        settings = {
            "name": name,
            "storage": str(folder / "runs"),
            "scale.workers": 2,
            "optim.max_steps": STEPS,
            "adapter.dropout": 0.1,
            "checkpoint.every_steps": EVERY,
            "checkpoint.keep": 3,
            "log.to": "[]",
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [*finray_command(), "train", "recipe.yaml", *KINDS[kind]]
        command += [word for setting in words for word in ("--set", setting)]
        self.started = time.perf_counter()
        self._child = start(command, folder, threads)

    def last_step(self) -> int:
        """The step of the last whole line of metrics.jsonl; 0 without one."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def record(self) -> dict[str, Any]:
        """run.json."""
        path = self.folder / "run.json"
        values: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return values

    def wait(self, condition: Callable[[], bool], what: str) -> float:
        """Wait for a condition. Returns the seconds since the command started."""
        while not condition():
            seconds = time.perf_counter() - self.started
            if seconds > LONGEST_WAIT or (self._child.poll() is not None and not condition()):
                raise RuntimeError(f"{self.folder.name}: no {what} after {seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - self.started

    def kill_worker(self, number: int) -> None:
        """Send SIGKILL to one of the two workers."""
        family = psutil.Process(self._child.pid).children(recursive=True)
        workers = [
            process for process in family if any(mark in _command(process) for mark in MARKS)
        ]
        sorted(workers, key=lambda process: process.pid)[number % len(workers)].kill()

    def finish(self) -> None:
        """Wait for the end of the run, which must succeed."""
        assert self._child.stdout is not None
        self._child.stdout.close()
        try:
            code = self._child.wait(LONGEST_WAIT)
        except subprocess.TimeoutExpired:
            code = -1
        if code != 0:
            raise RuntimeError(f"{self.folder.name} ended with {code}: {self.record()}")

    def weights(self) -> bytes:
        """Bytes of the trained adapter's weights."""
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join((process.name(), *process.cmdline()))
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def kill_once(folder: Path, number: int, kind: str, threads: int, expected: bytes) -> KilledRun:
    """Run once and kill a worker at a random moment.

    Raises:
        NotComparable: the result differs from that of an undisturbed run.
    """
    draw = random.Random(number)
    moment, victim = draw.randrange(EVERY + 1, STEPS - EVERY), draw.randrange(2)
    run = Run(folder, f"kill-{number}", kind, threads)
    begun = run.wait(lambda: run.last_step() >= 1, "first step")
    run.wait(lambda: run.last_step() >= moment, f"step {moment}")
    run.kill_worker(victim)
    reached, killed = run.last_step(), time.perf_counter() - run.started

    def trains_again() -> bool:
        restarts = run.record().get("restarts") or []
        return bool(restarts) and run.last_step() > restarts[0]["step"]

    again = run.wait(trains_again, "step after the kill")
    run.finish()
    if run.weights() != expected:
        raise NotComparable(f"kill {number} at step {reached} changed the result")
    return KilledRun(begun, again - killed, reached - run.record()["restarts"][0]["step"])


def figures_of(kind: str, kills: list[KilledRun], count: int) -> list[Figure]:
    """The figures of one kind of workers."""
    return [
        Figure(
            f"kill of a worker to the next step, beyond a start, {kind}",
            tuple(run.recovery - run.start for run in kills),
            Target("at most", 10, " s"),
            " s",
        ),
        Figure(
            f"steps repeated after a kill, {kind}",
            tuple(float(run.repeated) for run in kills),
            Target("at most", EVERY),
        ),
        Figure(
            f"kills whose result is equal bit for bit, {kind}",
            (float(len(kills)),),
            Target("at least", float(count)),
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    parser.add_argument("--kills", type=int, default=20, help="how many; default: 20")


def main() -> None:
    """Kill, compare, write."""
    options, given = parse_options(__doc__, repetitions=1, add=add_arguments)
    count = 2 if options.quick else given.kills
    threads = 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with scratch() as folder:
        make_inputs(folder, QUICK)
        undisturbed = Run(folder, "undisturbed", "processes", threads)
        undisturbed.finish()
        expected = undisturbed.weights()
        kills: dict[str, list[KilledRun]] = {kind: [] for kind in KINDS}
        for number in range(count):
            for kind, done in kills.items():
                done.append(kill_once(folder, number, kind, threads, expected))
                print(f"  {number + 1}/{count} {kind} {done[-1]}", file=sys.stderr, flush=True)
    figures = [figure for kind, done in kills.items() for figure in figures_of(kind, done, count)]
    seconds = {}
    for kind, done in kills.items():
        seconds[f"command to first step, {kind}"] = [run.start for run in done]
        seconds[f"kill to next step, {kind}"] = [run.recovery for run in done]
    conclude(
        "kills", options, figures, seconds, {"steps": STEPS, "every_steps": EVERY, "kills": count}
    )


if __name__ == "__main__":
    main()
