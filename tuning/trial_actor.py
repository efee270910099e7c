"""A trial slot: a Ray actor that runs one trial after the other in the same process.

A trial trains in a thread of the slot. Its measures go to the driver, and the thread waits for the
decision: a pruned trial takes no further step. A trial with several workers is a Ray Train run that
the thread starts and follows.
"""

import math
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypedDict

from ray import tune

from ..training.common.background import Stop
from ..training.common.errors import FinrayError, RunError, in_one_line
from ..training.common.progress import Progress
from ..training.common.secrets import redact
from ..training.common.storage import Folder
from ..training.config.recipe import Recipe, recipe_from_dict
from ..training.engine.context import watch_stop_file
from ..training.engine.task import WorkerResult, WorkerTask
from ..training.launch.in_process import InProcessLauncher
from ..training.launch.retries import Launcher
from ..training.models.base_cache import BaseCache
from ..training.models.devices import Room
from ..training.models.dtypes import free_memory
from ..training.records.recorder import now, update_run
from ..training.records.run_folder import Record, existing_run, read_metrics, read_run
from ..training.rehearsal.outcome import Outcome
from ..training.run import run_folder

_POLL_SECONDS = 0.5
_OF_ITS_STEPS = ("loss", "grad_norm")
"""Metrics that are not finite where steps were skipped; such steps change nothing."""


class TrialConfig(TypedDict):
    """The configuration of a trial, as plain values that Ray Tune sends to a slot."""

    number: int
    recipe: dict[str, Any]
    prepared: str
    """URI of the trial's prepared data set."""
    rehearsal: str
    """The outcome of the sweep's rehearsal, as JSON."""
    sweep: str
    """URI of the sweep's folder; a stop file in it makes the trial save and end."""
    env: dict[str, str]
    """Environment variables of the workers."""
    room: dict[str, Any] | None
    """`Room` of the trial's GPU; None without one."""
    watched: list[str]
    """Metrics that are reported to the driver; the first one decides on pruning."""
    total_steps: int
    reported_tokens: int
    """The driver already has the trial's measures up to this number of tokens."""
    until: int | None
    """Step after which the trial saves a checkpoint and pauses; None to train to the end."""


class Pruned(Exception):
    """Raised in a trial's training thread when the driver stops the trial."""


class TrialSlot(tune.Trainable):
    """A slot as Ray Tune sees it: each `step` returns the trial's next report.

    The trials of a slot share the frozen base model and the watcher of the sweep's stop file.
    """

    def setup(self, config: TrialConfig) -> None:
        """Start the first trial."""
        # torch reads these when it is imported.
        os.environ.update(config["env"])
        self._bases = BaseCache()
        self._sweep_stop = watch_stop_file(Folder(config["sweep"]))
        self._running = RunningTrial(config, self._bases, self._sweep_stop)

    def step(self) -> Record:
        """The trial's next report; in the last one `done` is True."""
        return self._running.next_report()

    def reset_config(self, new_config: TrialConfig) -> bool:
        """End the current trial and start another one in this process."""
        self._running.abort()
        self._running = RunningTrial(new_config, self._bases, self._sweep_stop)
        return True

    def cleanup(self) -> None:
        """End the trial that still runs."""
        self._running.abort()


class RunningTrial:
    """A trial that trains in a thread and waits after each report until it may continue.

    Args:
        config: the trial's configuration.
        bases: keeps the frozen base model for the slot's next trial.
        sweep_stop: set when the whole sweep should save and end.
    """

    def __init__(self, config: TrialConfig, bases: BaseCache, sweep_stop: threading.Event) -> None:
        self._config = config
        self._bases = bases
        self._sweep_stop = sweep_stop
        self._recipe = recipe_from_dict(config["recipe"])
        room = config["room"]
        self._room = None if room is None else Room(**room)
        self._reports: queue.Queue[Record] = queue.Queue()
        self._permits = threading.Semaphore(0)
        self._is_waiting = False
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="finray-trial", daemon=True)

    def next_report(self) -> Record:
        """Let the training continue to its next report, and return that.

        The first call starts the training: Ray Tune creates slots that it never uses if another
        slot becomes free for the same trial.
        """
        if self._thread.ident is None:
            self._thread.start()
        elif self._is_waiting:
            self._permits.release()
        report = self._reports.get()
        self._is_waiting = not report["done"]
        return report

    def abort(self) -> None:
        """Stop the training without a checkpoint, and wait until it has ended."""
        self._aborted.set()
        self._permits.release()
        if self._thread.ident is not None:
            self._thread.join()

    def report(self, measures: dict[str, float]) -> None:
        """Send measures to the driver and wait for its decision; called in the training thread.

        Raises:
            Pruned: the driver has stopped the trial.
        """
        if self._aborted.is_set():
            raise Pruned
        if any(name in measures for name in self._config["watched"]):
            name = self._config["watched"][0]
            report = {
                "tokens": measures["tokens"],
                "value": _objective(measures, name),
                "is_last": measures["step"] >= self._config["total_steps"],
            }
            self._reports.put({**self._about("running"), **report, "measures": dict(measures)})
            self._permits.acquire()
        if self._aborted.is_set():
            raise Pruned

    def _run(self) -> None:
        try:
            self._reports.put(self._train())
        except Exception as error:  # noqa: BLE001 - a trial's error must not end the slot
            message, code = f"{type(error).__name__}: {in_one_line(error)}", 1
            if isinstance(error, FinrayError):
                message, code = str(error), error.exit_code
            failure = {"error": redact(message), "exit_code": code}
            self._reports.put({**self._about("failed"), **failure})
        finally:
            free_memory()

    def _train(self) -> Record:
        from ..training.data.prepared import open_prepared
        from ..training.run import run_prepared

        prepared = open_prepared(Folder(self._config["prepared"]))
        if prepared is None:
            raise RunError(
                f"the prepared data set {self._config['prepared']} no longer exists; run the same "
                "command again"
            )
        try:
            self._report_again()
        except Pruned:
            return self._last_report(self._record_pruned(), "pruned")
        until = self._config["until"]
        with self._launcher() as launcher:
            outcome = Outcome.from_json(self._config["rehearsal"])
            result = run_prepared(self._recipe, prepared, launcher, until=until, outcome=outcome)
        record = existing_run(run_folder(self._recipe))
        status = str(record["status"])
        if status == "stopped" and until is not None and record["step"] >= until:
            status = "paused"
        report = self._last_report(record, status)
        if status == "failed":
            report |= {"error": str(record["error"]), "exit_code": result["exit_code"]}
        return report

    def _launcher(self) -> AbstractContextManager[Launcher]:
        if self._recipe.scale.most_workers <= 1:
            stop = Stop(self._sweep_stop)
            return nullcontext(_TrialLauncher(stop, self.report, self._bases, self._room))
        return self._ray_launcher()

    @contextmanager
    def _ray_launcher(self) -> Iterator[Launcher]:
        """A launcher of several workers, and a thread that reports the metrics they write."""
        from ..training.launch.ray_workers import RayLauncher

        stop, ended = Stop(), threading.Event()
        follower = threading.Thread(
            target=self._follow, args=(run_folder(self._recipe), stop, ended)
        )
        ray = RayLauncher(self._recipe.scale, stop, self._config["env"], room=self._room)
        follower.start()
        try:
            with ray as launcher:
                yield _PrunableLauncher(launcher, self._aborted)
        finally:
            ended.set()
            follower.join()

    def _report_again(self) -> None:
        """Report metrics of an earlier attempt that its driver did not record."""
        for line in _lines(run_folder(self._recipe)):
            if line["tokens"] > self._config["reported_tokens"]:
                self.report(line)

    def _record_pruned(self) -> Record:
        """Mark the run of a killed attempt as pruned. Returns the content of run.json."""
        folder, end = run_folder(self._recipe), {"status": "pruned", "finished_at": now()}
        if (read_run(folder) or {}).get("status") == "running":
            update_run(folder, lambda record: record.update(end))
        return read_run(folder) or {}

    def _last_report(self, record: Record, status: str) -> Record:
        return {**self._about(status), "measures": final_measures(self._recipe, record)}

    def _about(self, status: str) -> Record:
        return {
            "number": self._config["number"],
            "status": status,
            "done": status != "running",
            "measures": {},
        }

    def _follow(self, run: Folder, stop: Stop, ended: threading.Event) -> None:
        """Report the metrics that a run of several workers writes into its folder."""
        reported, is_over = len(_lines(run)), False
        while not is_over:
            is_over = ended.wait(_POLL_SECONDS)
            if self._sweep_stop.is_set() or self._aborted.is_set():
                stop.requested.set()
            lines = _lines(run)
            # A restart of the workers removes the lines after its checkpoint.
            for line in lines[min(reported, len(lines)) :]:
                try:
                    self.report(line)
                except Pruned:
                    stop.requested.set()
            reported = len(lines)


class _TrialLauncher(InProcessLauncher):
    """Trains in the slot's process; `Pruned` ends the attempt with the status pruned."""

    def attempt(self, task: WorkerTask) -> WorkerResult:
        try:
            return super().attempt(task)
        except Pruned:
            return WorkerResult(status="pruned", error=None, exit_code=0)


class _PrunableLauncher(Launcher):
    """Wraps a launcher: a stopped attempt counts as pruned if the driver stopped the trial."""

    def __init__(self, launcher: Launcher, aborted: threading.Event) -> None:
        self.stop = launcher.stop
        self.room = launcher.room
        self.max_failures = launcher.max_failures
        self._launcher = launcher
        self._aborted = aborted

    def attempt(self, task: WorkerTask) -> WorkerResult:
        result = self._launcher.attempt(task)
        if self._aborted.is_set() and result["status"] == "stopped":
            result["status"] = "pruned"
        return result

    def wait_until_ready(self, progress: Progress) -> None:
        self._launcher.wait_until_ready(progress)


def _objective(measures: Record, name: str) -> float | None:
    """The objective in a line of metrics, which writes nan as null; None if it has no value."""
    value: float | None = measures.get(name)
    if name in _OF_ITS_STEPS:
        return value if value is not None and math.isfinite(value) else None
    return math.nan if value is None and name in measures else value


def _lines(run: Folder) -> list[Record]:
    """The lines of metrics.jsonl from step 1 on, without the evaluation before training."""
    return [line for line in read_metrics(run) if line["step"]]


def final_measures(recipe: Recipe, record: Record) -> Record:
    """The last value of each metric of a trial, and its sizes and times.

    They are the values of its objectives and of its row in the table.
    """
    folder = run_folder(recipe)
    latest: Record = {}
    speeds = []
    for line in _lines(folder):
        skipped = [name for name in _OF_ITS_STEPS if line.get(name) is None]
        latest.update({name: value for name, value in line.items() if name not in skipped})
        speeds += [line["tokens_per_second"]] if line.get("tokens_per_second") else []
    if speeds:
        latest["tokens_per_second"] = sorted(speeds)[len(speeds) // 2]
    result = record.get("result")
    if result:
        latest["adapter_bytes"] = _bytes_of_weights(folder / str(result))
    parameters = record.get("parameters") or {}
    if "trainable" in parameters:
        latest["trainable_parameters"] = parameters["trainable"]
    latest["wall_seconds"] = record.get("wall_seconds")
    return latest


def _bytes_of_weights(folder: Folder) -> int:
    names = [name for name in folder.files() if name.endswith(".safetensors")]
    infos = folder.filesystem.get_file_info([folder.file(name) for name in names])
    return sum(int(info.size) for info in infos)
