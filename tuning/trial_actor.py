"""A trial slot: a Ray actor that runs one trial after the other in the same process.

A trial trains in a thread of the slot. What it measures goes to the driver, and the thread waits
for the answer: a pruned trial does no step more. A trial with several workers is a Ray Train run
that the thread starts and follows.
"""

import os
import queue
import threading
from functools import lru_cache
from typing import Any, TypedDict

from ray import tune

from ..training.common.errors import FinrayError, last_line
from ..training.common.secrets import redact
from ..training.common.stop import Stop
from ..training.common.storage import Folder
from ..training.config.recipe import Recipe, recipe_from_dict
from ..training.models.dtypes import free_memory
from ..training.records.recorder import now, update_run
from ..training.records.run_folder import Record, read_metrics, read_run
from ..training.run import run_folder

_POLL_SECONDS = 0.5


class TrialConfig(TypedDict):
    """What a slot is told of a trial; plain values."""

    number: int
    recipe: dict[str, Any]
    prepared: str
    """URI of its prepared data set."""
    sweep: str
    """URI of the sweep's folder; a stop file there ends the trial with a save."""
    env: dict[str, str]
    """Environment variables for those who train."""
    watched: list[str]
    """A measurement with one of these is reported; trials are judged by the first."""
    total_steps: int
    heard: int
    """Tokens up to which the driver knows what the trial measured."""
    until: int | None
    """A step to save and pause after, before the end."""


class Pruned(Exception):
    """Raised inside a trial's training when the driver has given it up."""


class TrialSlot(tune.Trainable):
    """Ray Tune's side of a slot: each `step` returns the trial's next report."""

    def setup(self, config: TrialConfig) -> None:
        """Start the first trial."""
        # Before torch is loaded: it reads them then.
        os.environ.update(config["env"])
        self._running = RunningTrial(config)

    def step(self) -> Record:
        """The next report; the last one has `done`."""
        return self._running.next_report()

    def reset_config(self, new_config: TrialConfig) -> bool:
        """Give up what still runs, and start another trial in this process."""
        self._running.give_up()
        self._running = RunningTrial(new_config)
        return True

    def cleanup(self) -> None:
        """Give up what still runs."""
        self._running.give_up()


class RunningTrial:
    """A trial that trains in a thread, and waits after each report for permission to go on."""

    def __init__(self, config: TrialConfig) -> None:
        self._config = config
        self._recipe = recipe_from_dict(config["recipe"])
        self._reports: queue.Queue[Record] = queue.Queue()
        self._permits = threading.Semaphore(0)
        self._is_waiting = False
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="finray-trial", daemon=True)

    def next_report(self) -> Record:
        """Let the training go on to its next report.

        It starts at the first call: Ray Tune makes slots that it never uses, when one for the same
        trial comes free meanwhile.
        """
        if self._thread.ident is None:
            self._thread.start()
        elif self._is_waiting:
            self._permits.release()
        report = self._reports.get()
        self._is_waiting = not report["done"]
        return report

    def give_up(self) -> None:
        """End the training without a save, and wait for its end."""
        self._given_up.set()
        self._permits.release()
        if self._thread.ident is not None:
            self._thread.join()

    def report(self, measures: dict[str, float]) -> None:
        """Called by the training thread: hand over, wait.

        Raises:
            Pruned: the driver does not want the trial any more.
        """
        if self._given_up.is_set():
            raise Pruned
        if any(name in measures for name in self._config["watched"]):
            name = self._config["watched"][0]
            report = {
                "tokens": measures["tokens"],
                "value": measures.get(name),
                "is_last": measures["step"] >= self._config["total_steps"],
            }
            self._reports.put({**self._about("running"), **report, "measures": dict(measures)})
            self._permits.acquire()
        if self._given_up.is_set():
            raise Pruned

    def _run(self) -> None:
        try:
            self._reports.put(self._carry_out())
        except Exception as error:  # noqa: BLE001 - a trial's error must not end the slot
            told = f"{type(error).__name__}: {last_line(error)}"
            if isinstance(error, FinrayError):
                told = str(error)
            code = error.exit_code if isinstance(error, FinrayError) else 1
            self._reports.put({**self._about("failed"), "error": redact(told), "exit_code": code})
        finally:
            free_memory()

    def _carry_out(self) -> Record:
        from ..training.common.errors import RunError
        from ..training.data.prepared import open_prepared
        from ..training.models.base_cache import keep_bases
        from ..training.run import carry_out

        prepared = open_prepared(Folder(self._config["prepared"]))
        if prepared is None:
            raise RunError(f"the prepared data set {self._config['prepared']} is gone")
        try:
            self._retell()
        except Pruned:
            return self._ended(self._note_pruned(), "pruned")
        keep_bases()
        launch = self._launch_here if self._recipe.scale.most_workers <= 1 else self._launch_on_ray
        codes: list[int] = []

        until = self._config["until"]

        def launch_and_note(job: Any) -> Any:
            outcome = launch({**job, "until": until})
            codes.append(outcome["exit_code"])
            return outcome

        record = carry_out(self._recipe, prepared, launch_and_note)
        status = str(record["status"])
        if status == "stopped" and until is not None and record["step"] >= until:
            status = "paused"
        told = self._ended(record, status)
        if record["status"] == "failed":
            told |= {"error": str(record["error"]), "exit_code": codes[-1]}
        return told

    def _retell(self) -> None:
        """Report what an earlier attempt measured and its driver did not live to hear."""
        for line in _lines(run_folder(self._recipe)):
            if line["tokens"] > self._config["heard"]:
                self.report(line)

    def _note_pruned(self) -> Record:
        """A run that was killed on its way has no end yet; returns run.json."""
        folder, told = run_folder(self._recipe), {"status": "pruned", "finished_at": now()}
        if (read_run(folder) or {}).get("status") == "running":
            update_run(folder, lambda record: record.update(told))
        return read_run(folder) or {}

    def _ended(self, record: Record, status: str) -> Record:
        return {**self._about(status), "measures": final_measures(self._recipe, record)}

    def _about(self, status: str) -> Record:
        return {
            "number": self._config["number"],
            "status": status,
            "done": status != "running",
            "measures": {},
        }

    def _launch_here(self, job: Any) -> Any:
        from ..training.engine.context import LocalSession
        from ..training.engine.task import Outcome
        from ..training.engine.worker import run_worker

        trial = self

        class TrialSession(LocalSession):
            def report(self, measures: dict[str, float]) -> None:
                trial.report(measures)

        session = TrialSession(Folder(job["run"]), _stop_event(self._config["sweep"]))
        try:
            return run_worker(job, session)
        except Pruned:
            return Outcome(status="pruned", error=None, exit_code=0)

    def _launch_on_ray(self, job: Any) -> Any:
        from ..training.launch.ray_workers import launch_on_ray

        stop = Stop()
        ended = threading.Event()
        follower = threading.Thread(target=self._follow, args=(Folder(job["run"]), stop, ended))
        follower.start()
        try:
            scale, env = self._recipe.scale, self._config["env"]
            outcome = launch_on_ray(job, scale, stop, env, lambda _: None)
        finally:
            ended.set()
            follower.join()
        if self._given_up.is_set() and outcome["status"] == "stopped":
            outcome["status"] = "pruned"
        return outcome

    def _follow(self, run: Folder, stop: Stop, ended: threading.Event) -> None:
        """Report what a run of several workers writes into its folder."""
        sweep_stop = _stop_event(self._config["sweep"])
        told, is_over = len(_lines(run)), False
        while not is_over:
            is_over = ended.wait(_POLL_SECONDS)
            if sweep_stop.is_set() or self._given_up.is_set():
                stop.requested.set()
            lines = _lines(run)
            # A restart of the workers takes back the lines after its checkpoint.
            for line in lines[min(told, len(lines)) :]:
                try:
                    self.report(line)
                except Pruned:
                    stop.requested.set()
            told = len(lines)


def _lines(run: Folder) -> list[Record]:
    """What a run measured from its first step on."""
    return [line for line in read_metrics(run) if line["step"]]


def final_measures(recipe: Recipe, record: Record) -> Record:
    """What a trial reached, for its objectives and its row in the table."""
    folder = run_folder(recipe)
    latest: Record = {}
    speeds = []
    for line in _lines(folder):
        latest.update(line)
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


@lru_cache(maxsize=4)
def _stop_event(sweep: str) -> threading.Event:
    """One watcher a process, not one a trial."""
    from ..training.engine.context import watch_stop_file

    return watch_stop_file(Folder(sweep))
