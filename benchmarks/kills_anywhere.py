"""A command is killed at a random moment of its work, 44 times, and given again: equal bit for bit?

Moments of preparation, training, save and upload, export and sweep; the driver alone is killed, or
all of its processes at once. A moment and a victim are drawn from the kill's number. Nothing is
timed, so a busy machine does not matter.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from measure import (
    Figure,
    NotComparable,
    Target,
    conclude_stage,
    finray_command,
    parse_options,
    scratch,
)
from start import QUICK, has_exited, make_inputs, start

STEPS, EVERY = 30, 5
LONGEST_WAIT = 600.0
RATES = (1e-4, 3e-4, 1e-3)

Digest = dict[str, str]
"""What a result consists of: a hash by its name."""


@dataclass(frozen=True)
class Work:
    """A command that is killed.

    Args:
        kills: how often.
        arguments: of `finray`.
        made: its folder or file, which each kill begins without.
        result: reads what it made, as hashes.
        in_a_save: the kill comes while a checkpoint is saved or uploaded; else at any moment.
        appears: what appears whole at the command's end; a kill after that changes nothing, and the
            same command would refuse to write over it.
        needs: the work whose result it needs.
    """

    kills: int
    arguments: list[str]
    made: tuple[str, ...]
    result: Callable[[Path], Digest]
    in_a_save: bool = False
    appears: str | None = None
    needs: str | None = None


def hashes(folder: Path, pattern: str) -> Digest:
    """Files of a folder by their relative path."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def prepared(folder: Path) -> Digest:
    """The rows of the prepared data."""
    tables = sorted((folder / "runs" / "prepared").glob("**/*.parquet"))
    rows = [json.dumps(pq.read_table(path).to_pylist(), default=str) for path in tables]
    if not rows:
        raise NotComparable("nothing was prepared")
    return {"rows": hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()}


def trained(folder: Path) -> Digest:
    """The adapter, and the loss of each step."""
    run = folder / "runs" / "killed"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    if sorted(losses) != list(range(1, STEPS + 1)):
        raise NotComparable(f"steps {sorted(losses)} have a loss")
    return {"losses": json.dumps(losses, sort_keys=True), **hashes(run, "adapter/*.safetensors")}


def exported(folder: Path) -> Digest:
    """Every file of the export."""
    return hashes(folder / "exported", "**/*")


def searched(folder: Path) -> Digest:
    """The value of each setting, and the best adapter."""
    sweep = folder / "runs" / "sweep"
    record = json.loads((sweep / "sweep.json").read_text("utf-8"))
    trials = {
        str(trial["settings"]["optim.learning_rate"]): str(trial["values"][0])
        for trial in record["trials"]
    }
    if len(trials) != len(RATES):
        raise NotComparable(f"the sweep tried {sorted(trials)}")
    return {**trials, **hashes(sweep, "adapter/*.safetensors")}


def last_step(folder: Path) -> int:
    """The step of the last whole line of the run's metrics; 0 without one."""
    path = folder / "runs" / "killed" / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def settings(folder: Path, workers: int) -> dict[str, Any]:
    """What a run changes in the recipe."""
    return {
        "storage": str(folder / "runs"),
        "scale.workers": workers,
        "optim.max_steps": STEPS,
        "adapter.dropout": 0.1,
        "checkpoint.every_steps": EVERY,
        "log.to": [],
    }


def make_sweep(folder: Path) -> None:
    """Write a sweep that tries three rates, one after the other."""
    sweep = {
        "name": "sweep",
        "recipe": "recipe.yaml",
        "storage": str(folder / "runs"),
        "set": {**settings(folder, 1), "data.holdout": 0.1},
        "sampler": "grid",
        "search": {"optim.learning_rate": {"choice": list(RATES)}},
        "trials": len(RATES),
        "concurrency": 1,
        "pruning": {"kind": "none"},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")


def works(folder: Path, quick: bool) -> dict[str, Work]:
    """What is killed, in the order in which one needs another's result."""

    def times(count: int) -> int:
        return 1 if quick else count

    changes = {"name": "killed", **settings(folder, 2)}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    train = ["train", "recipe.yaml", *words]
    runs = ("runs/killed",)
    return {
        "preparation": Work(
            times(10),
            ["prepare", "recipe.yaml", *words],
            ("runs",),
            prepared,
        ),
        "training": Work(times(12), train, runs, trained),
        "save or upload": Work(times(10), train, runs, trained, in_a_save=True),
        "export": Work(
            times(6),
            ["export", "runs/killed", "--merge", "--to", "exported"],
            ("exported",),
            exported,
            appears="exported",
            needs="training",
        ),
        "sweep": Work(
            times(6),
            ["tune", "sweep.yaml"],
            ("runs/sweep",),
            searched,
        ),
    }


class Command:
    """A finray command in a process group of its own."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.started = time.perf_counter()
        self._child = start([*finray_command(), *arguments, "--quiet"], folder, 1)

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False if the command ended before."""
        while not condition():
            if has_exited(self._child):
                return False
            if time.perf_counter() - self.started > LONGEST_WAIT:
                raise RuntimeError(f"no end after {LONGEST_WAIT:.0f} s")
            time.sleep(0.001)
        return True

    def kill(self, whole_group: bool) -> None:
        """Send SIGKILL to the driver, or to all processes of its group."""
        if whole_group:
            os.killpg(self._child.pid, signal.SIGKILL)
        else:
            os.kill(self._child.pid, signal.SIGKILL)
        self._child.wait(LONGEST_WAIT)
        self._close()

    def finish(self) -> float:
        """Wait for the end, which must be a success; returns the seconds since the start."""
        code = self._child.wait(LONGEST_WAIT)
        self._close()
        if code != 0:
            raise RuntimeError(f"the command ended with {code}")
        return time.perf_counter() - self.started

    def _close(self) -> None:
        assert self._child.stdout is not None
        self._child.stdout.close()


def remove(folder: Path, names: tuple[str, ...]) -> None:
    """Delete what a work has made."""
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)


def kill_once(
    folder: Path, work: Work, number: int, seconds: float, expected: Digest
) -> str | None:
    """Kill the command once, give it again, compare. Returns what was done; None if the command
    ended before the moment.

    Args:
        seconds: how long the undisturbed command takes.

    Raises:
        NotComparable: the result is another one.
    """
    draw = random.Random(number)
    remove(folder, work.made)
    command = Command(folder, work.arguments)
    if work.in_a_save:
        step = EVERY * draw.randrange(1, STEPS // EVERY)
        reached = command.wait(lambda: last_step(folder) >= step)
        time.sleep(draw.uniform(0, 0.3))
    else:
        until = command.started + draw.uniform(0.1, 0.95) * seconds
        reached = command.wait(lambda: time.perf_counter() >= until)
    at = time.perf_counter() - command.started
    whole = bool(number % 2)
    if not reached:
        command.finish()
        return None
    command.kill(whole)
    if work.appears is None or not (folder / work.appears).exists():
        Command(folder, work.arguments).finish()
    if work.result(folder) != expected:
        raise NotComparable(f"kill {number} after {at:.1f} s changed the result")
    victim = "all processes" if whole else "the driver"
    return f"{victim} after {at:.1f} of {seconds:.1f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark alone."""
    names = tuple(works(Path(), quick=True))
    parser.add_argument("--stage", action="append", choices=names, help="default: all")


def main() -> None:
    """Kill, compare, write the result of each work."""
    options, given = parse_options(__doc__, repetitions=1, add=add_arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with scratch() as folder:
        make_inputs(folder, QUICK)
        make_sweep(folder)
        all_works = works(folder, options.quick)
        stages = given.stage or list(all_works)
        needed = {all_works[stage].needs for stage in stages}
        for name, work in all_works.items():
            if name not in stages and name not in needed:
                continue
            seconds = Command(folder, work.arguments).finish()
            if name not in stages:
                continue
            expected = work.result(folder)
            done, number = 0, 0
            while done < work.kills:
                killed = kill_once(folder, work, number, seconds, expected)
                done, number = done + (killed is not None), number + 1
                print(f"  {name} {done}/{work.kills}: {killed}", file=sys.stderr, flush=True)
            figure = f"kills during {name} whose result is equal bit for bit"
            figures = [Figure(figure, (float(done),), Target("at least", work.kills))]
            settings = {"steps": STEPS, "every_steps": EVERY}
            conclude_stage("kills_anywhere", name, options, figures, {}, settings)


if __name__ == "__main__":
    main()
