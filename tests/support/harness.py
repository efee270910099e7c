"""The real command in child processes, and what its runs leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.numpy import load_file

from finray.training.common.storage import Folder
from finray.training.config.recipe import load_recipe
from finray.training.records.run_folder import PREPARED_FOLDER
from finray.training.rehearsal.child import REHEARSALS
from finray.training.rehearsal.key import key_of

from .forking import COMMAND, FORKED, WORKER, WORKER_TITLE, Forked, ForkServer, Task
from .rehearsed import OK

PATIENCE = 600
"""Seconds until a wait is given up: far above what a busy machine needs, so a hang, and no test of
speed."""


@dataclass
class Command:
    """A running `finray`, with all its processes in a session of their own."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    family: set[psutil.Process] = field(default_factory=set)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def watch_family(self) -> set[psutil.Process]:
        """All descendants seen so far."""
        with suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        waiting = list(self.family)
        while waiting:
            with suppress(psutil.NoSuchProcess):
                if (name := waiting.pop().name()).startswith(FORKED):  # for a worker of Ray's
                    waiting.append(psutil.Process(int(name.removeprefix(FORKED))))
                    self.family.add(waiting[-1])
        return self.family

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to the driver alone, as the kernel's memory killer does."""
        self.process.kill()
        self.process.wait(30)

    def survivors(
        self, seconds: float, among: set[psutil.Process] | None = None
    ) -> list[psutil.Process]:
        """Descendants, or those given, that are still there after a while."""
        processes = list(self.family if among is None else among)
        _, alive = psutil.wait_procs(processes, timeout=seconds)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


class Finray:
    """Starts the command in a folder, and ends what is left of it.

    Args:
        folder: where it runs.
        model: the recipes' base.
        data: the recipes' rows.
        server: forks the commands; without it, each starts a new process.
        place: from a command to the one that runs it elsewhere, such as on another host.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        data: Path,
        server: ForkServer | None = None,
        place: Callable[[list[str]], list[str]] = lambda command: command,
    ) -> None:
        self._server = server
        self._place = place
        self.folder = folder
        self.model = model
        self.data = data
        self._started: list[Command] = []

    def recipe(self, **changes: Any) -> Path:
        """A recipe of 30 short steps with dropout, in the folder; `changes` by dotted key."""
        values: dict[str, Any] = {
            "name": "run",
            "model": {"base": str(self.model)},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"train": [{"path": str(self.data)}], "max_length": 128, "packing": False},
            "optim": {
                "batch_size": 8,
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                "max_steps": 30,
            },
            "checkpoint": {"every_steps": 5, "keep": 3},
            "log": {"every_steps": 1, "to": []},
            "scale": {"workers": 0},
            "storage": "runs",
        }
        for key, value in changes.items():
            section = values
            *parents, last = key.split("__")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        path = self.folder / f"{values['name']}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def keep_rehearsal(self, recipe: Path) -> None:
        """Keep the outcome that a recipe's rehearsal has, which a process that is not forked needs
        ten seconds for."""
        loaded = load_recipe(recipe)
        home = Folder(loaded.storage) / PREPARED_FOLDER / REHEARSALS
        home.create()
        home.write(f"{key_of(loaded, Path(loaded.model.base))}.json", OK.to_json().encode())

    def start(
        self,
        *arguments: str | Path,
        environment: dict[str, str] | None = None,
        fresh: bool = False,
    ) -> Command:
        """Start the command.

        Args:
            arguments: the command's.
            environment: variables besides this process's.
            fresh: not forked, but started as users start it.
        """
        log = self.folder / f"output-{len(self._started)}.txt"
        words = [str(argument) for argument in arguments]
        variables = {**os.environ, "COLUMNS": "100", **(environment or {})}
        with log.open("wb") as stream, Path(os.devnull).open("rb") as nothing:
            process: subprocess.Popen[bytes] | Forked
            if self._server is None or fresh:
                process = subprocess.Popen(
                    self._place([sys.executable, "-m", COMMAND, *words]),
                    cwd=self.folder,
                    stdin=nothing,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=variables,
                )
            else:
                task = Task(COMMAND, words, variables, str(self.folder), new_session=True)
                out = stream.fileno()
                process = self._server.start(task, nothing.fileno(), out, out)
        self._started.append(Command(process, log))
        return self._started[-1]

    def run(
        self, *arguments: str | Path, code: int = 0, seconds: float = PATIENCE, fresh: bool = False
    ) -> str:
        """Run to the end; returns what was printed."""
        command = self.start(*arguments, fresh=fresh)
        actual = command.wait(seconds)
        assert actual == code, f"exit code {actual}, expected {code}:\n{command.output()}"
        return command.output()

    def end_all(self) -> None:
        """End every command, and print what each printed: pytest shows it where a test fails."""
        for command in self._started:
            print(command.log.name, command.output()[-4000:], sep="\n")
            command.watch_family()
            for process in {*command.family}:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait(30)


def workers(command: Command) -> Iterator[psutil.Process]:
    """The workers that a command has now: Ray Train's, or processes of its own."""
    for process in command.watch_family():
        with suppress(psutil.NoSuchProcess):
            line = " ".join((process.name(), *process.cmdline()))
            if any(name in line for name in ("RayTrainWorker", WORKER, WORKER_TITLE)):
                yield process


def wait_until(
    condition: Callable[[], bool], what: str, seconds: float = PATIENCE, brief: bool = False
) -> None:
    """Poll a condition, and often where it holds for a brief moment only."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.0005 if brief else 0.02)


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def reached(run: Path, step: int) -> bool:
    """Reads the last line alone, as it is called again and again."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return bool(whole) and json.loads(whole[-1])["step"] >= step


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; a step logged twice is a fault."""
    values: dict[int, float] = {}
    for line in metrics(run):
        if "loss" in line:
            assert line["step"] not in values, f"step {line['step']} is logged twice"
            values[line["step"]] = line["loss"]
    return values


def assert_same_result(run: Path, reference: Path) -> None:
    """Final weights equal bit for bit, and every step's loss."""
    name = "adapter/adapter_model.safetensors"
    ours, theirs = load_file(run / name), load_file(reference / name)
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        assert (value == theirs[key]).all(), f"{key} differs"
    assert losses(run) == losses(reference)


def record(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return values
