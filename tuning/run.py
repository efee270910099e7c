"""The driver of one sweep.

plan → compare with an earlier attempt → prepare → search → best → report
"""

import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from ..training.common.background import Stop, run_in_thread
from ..training.common.errors import Interrupted, RunError, last_line
from ..training.common.lock import hold_run_lock
from ..training.common.storage import Folder
from ..training.config.recipe import Recipe
from ..training.data.prepared import Prepared
from ..training.engine.context import STOP_FILE
from ..training.records.checkpoint import choose
from ..training.records.recorder import now
from ..training.records.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, Record
from ..training.run import prepare_data
from .concurrency import decide_concurrency
from .conductor import Conductor
from .pbt import Population
from .plan import Plan
from .progress import Ending, SweepProgress
from .ray_tune import run_trials
from .report import write_report
from .results import copy, export_best, retrain
from .resume import check_folder, describe
from .samplers import first_rung, interval, make_pruner, make_sampler, parts
from .space import Settings
from .study import Assignment, StudyFile, SweepStudy
from .sweep_folder import TRIALS_FOLDER, drop_weights, trial_folder, trial_name, write_sweep
from .trial_actor import TrialConfig
from .warm_start import earlier_trials

_RETRY_SECONDS = 2.0


def tune(plan: Plan, progress: SweepProgress, stop: Stop, worker_env: dict[str, str]) -> Record:
    """Run a sweep, or resume an earlier attempt at it, on the initialised Ray.

    `worker_env` holds environment variables for the training processes.

    Returns:
        sweep.json.

    Raises:
        InputError: the data is invalid, the cluster too small, or the folder holds another sweep.
        RunError: no trial succeeded; sweep.json and the report are written all the same.
        Interrupted: `stop` was requested; the same command resumes it.
    """
    earlier = check_folder(plan)
    concurrency = decide_concurrency(plan.sweep.concurrency, plan.recipe.scale)
    with hold_run_lock(plan.folder.create(), stop.requested, progress) as stale:
        if stale is not None:
            progress.status(f"taking over the lock, whose holder no longer runs: {stale}")
        plan.folder.delete(STOP_FILE)
        recipes = plan.data_recipes()  # each data setting is prepared once
        prepared = {key: prepare_data(recipe, progress) for key, recipe in recipes.items()}
        sweep = _SweepRun(plan, progress, prepared, earlier or {}, concurrency, worker_env)
        return sweep.run(stop)


class _SweepRun:
    """One attempt at a sweep.

    Args:
        plan: the checked sweep.
        progress: receives events and status lines.
        prepared: the prepared data of each data setting, by `Space.data_key`.
        record: sweep.json of an earlier attempt; empty for a new sweep.
        concurrency: number of trials that run at the same time.
        worker_env: environment variables of the workers.
    """

    def __init__(
        self,
        plan: Plan,
        progress: SweepProgress,
        prepared: dict[str, Prepared],
        record: Record,
        concurrency: int,
        worker_env: dict[str, str],
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._prepared = prepared
        self._record = record
        self._concurrency = concurrency
        self._worker_env = worker_env
        self._folder = plan.folder
        first_data = prepared[plan.space.data_key(plan.points[0])]
        self._trial_tokens = _tokens_per_run(plan.recipe, first_data)
        self._record_start()
        self._file = StudyFile(plan.folder)
        self._study = self._open_study()
        sweep = plan.sweep.model_copy(update={"trials": plan.trials})
        population = None
        if plan.is_population:
            population = Population(sweep, self._study, plan.space, self._inherit)
        self._conductor = Conductor(
            sweep,
            self._study,
            concurrency,
            float(record.get("wall_seconds", 0.0)),
            self._changed,
            self._write_stop_file,
            population,
        )

    def run(self, stop: Stop) -> Record:
        with _TimeLimit(self._conductor):
            self._progress.status(f"searching; trials at the same time: {self._concurrency}")
            scale = self._plan.recipe.scale
            try:
                run_trials(self._conductor, self._config, scale, stop, self._progress)
            except Exception as error:
                self._record.update(status="failed", error=last_line(error), finished_at=now())
                with suppress(OSError):  # the storage itself may be the cause
                    write_sweep(self._folder, self._record)
                raise
        return self._conclude(stop)

    # the start

    def _record_start(self) -> None:
        plan = self._plan
        self._record.update(
            name=plan.sweep.name,
            status="running",
            error=None,
            over=None,
            started_at=self._record.get("started_at") or now(),
            finished_at=None,
            settings=describe(plan),
            objectives=[{"metric": metric.name, "mode": metric.mode} for metric in plan.metrics],
            prunes=plan.prunes,
            first_rung=first_rung(plan.sweep, self._trial_tokens) if plan.prunes else None,
            trial_tokens=self._trial_tokens,
            concurrency=self._concurrency,
            prepared=sorted({data.manifest.fingerprint for data in self._prepared.values()}),
            excluded={
                "count": plan.excluded_count,
                "first": [
                    {"settings": item.settings, "reason": item.reason} for item in plan.excluded
                ],
            },
        )
        self._record.setdefault("trials", [])
        self._record.setdefault("best", [])
        write_sweep(self._folder, self._record)

    def _open_study(self) -> SweepStudy:
        plan = self._plan
        study = SweepStudy(
            self._file.open(),
            plan.sweep.name,
            plan.metrics,
            plan.space,
            make_sampler(plan.sweep, len(self._record["trials"])),
            make_pruner(plan.sweep, plan.prunes, self._trial_tokens),
        )
        if not study.is_set_up:
            earlier = []
            for uri in plan.sweep.warm_start:
                trials = earlier_trials(Folder(uri), plan.space, plan.metrics)
                self._progress.status(f"warm start: {len(trials)} trials from {uri}")
                earlier += trials
            study.set_up(plan.points, earlier)
        return study

    # a trial

    def _recipe(self, number: int, settings: Settings, prepared: Prepared) -> Recipe:
        storage = (self._folder / TRIALS_FOLDER).uri
        recipe = self._plan.space.recipe(settings, name=trial_name(number), storage=storage)
        metric = self._plan.metrics[0].name
        if not metric.startswith("eval_") or recipe.eval.every_steps:
            return recipe
        # A trial can be compared at a rung or milestone only if it is evaluated there.
        if self._plan.is_population:
            every = self._interval(recipe, prepared)
        elif self._plan.prunes:
            steps = recipe.total_steps(prepared.manifest.train.sequences)
            every = -(-steps // parts(self._plan.sweep))
        else:
            return recipe
        return recipe.model_copy(
            update={"eval": recipe.eval.model_copy(update={"every_steps": every})}
        )

    def _interval(self, recipe: Recipe, prepared: Prepared) -> int:
        """Steps between a population's milestones, at which members are evaluated and may pause."""
        steps = recipe.total_steps(prepared.manifest.train.sequences)
        unit = math.lcm(recipe.method.repeats, recipe.eval.every_steps or 1)
        return interval(self._plan.sweep, self._trial_tokens, steps, unit)

    def _until(self, assignment: Assignment, recipe: Recipe, prepared: Prepared) -> int | None:
        """The step of an assignment's milestone; None if it trains to its last step."""
        if assignment.until is None:
            return None
        step = assignment.until * self._interval(recipe, prepared)
        return step if step < recipe.total_steps(prepared.manifest.train.sequences) else None

    def _inherit(self, parent: int, child: int) -> None:
        """Copy a trial's last checkpoint and metrics to a new trial, which continues from there."""
        source, target = (trial_folder(self._folder, number) for number in (parent, child))
        choice = choose(source / CHECKPOINTS_FOLDER)
        if choice.name is None:
            raise RunError(f"{source} has no checkpoint from which trial {child} could continue")
        target.delete()
        copy(source / CHECKPOINTS_FOLDER / choice.name, target / CHECKPOINTS_FOLDER / choice.name)
        target.write(METRICS_FILE, source.read(METRICS_FILE))

    def _config(self, assignment: Assignment) -> TrialConfig:
        prepared = self._prepared[self._plan.space.data_key(assignment.settings)]
        recipe = self._recipe(assignment.number, assignment.settings, prepared)
        return TrialConfig(
            number=assignment.number,
            recipe=recipe.model_dump(mode="json"),
            prepared=prepared.folder.uri,
            sweep=self._folder.uri,
            env=self._worker_env,
            watched=[metric.name for metric in self._plan.metrics],
            total_steps=recipe.total_steps(prepared.manifest.train.sequences),
            reported_tokens=self._study.reported_tokens(assignment.number),
            until=self._until(assignment, recipe, prepared),
        )

    def _changed(self, ending: Ending | None) -> None:
        """Write the sweep's records after a change of a trial, and delete unneeded weights."""
        self._record["wall_seconds"] = round(self._conductor.seconds, 2)
        self._record["trials"] = self._study.rows()
        before, self._record["best"] = self._record["best"], self._study.best()
        try:
            self._file.upload()
            write_sweep(self._folder, self._record)
        except OSError as error:  # the next change writes what this one could not
            self._progress.status(
                f"cannot write to {self._folder}, trying again later: {last_line(error)}"
            )
        if ending is None:
            return
        self._drop_weights({*before, ending.number})
        self._progress.trial_ended(ending, self._record)

    def _write_stop_file(self) -> None:
        """Write the stop file in the background; a storage that fails is tried again."""

        def write() -> None:
            while True:
                try:
                    self._folder.write(STOP_FILE, b"")
                except OSError:
                    time.sleep(_RETRY_SECONDS)
                else:
                    return

        run_in_thread(write, "stop-file")

    def _drop_weights(self, ended: Iterable[int]) -> None:
        for number in ended:
            drop_weights(self._folder, number, number in self._record["best"])

    # the end

    def _conclude(self, stop: Stop) -> Record:
        self._folder.delete(STOP_FILE)
        rows = self._study.rows()
        self._drop_weights(row["number"] for row in rows if row["state"] != "running")
        conductor = self._conductor
        interrupted = stop.requested.is_set()
        status = "stopped" if interrupted else "finished"
        if conductor.error is not None or (not interrupted and not self._study.best()):
            status = "failed"
        self._record.update(
            status=status,
            error=None if conductor.error is None else str(conductor.error),
            over=conductor.over,
            finished_at=now(),
            trials=rows,
            wall_seconds=round(conductor.seconds, 2),
        )
        self._file.upload()
        if self._study.best():
            export_best(self._plan, self._record)
        write_sweep(self._folder, self._record)
        write_report(self._folder, self._study.optuna, self._record)
        if conductor.error is not None:
            raise conductor.error
        if interrupted:
            raise Interrupted(f"stopped; the same command resumes the sweep ({self._folder})")
        if status == "failed":
            raise RunError(f"no trial finished with a result: {self._last_reason()}")
        if self._plan.sweep.retrain is not None:
            retrain(self._plan, self._record, self._progress, stop, self._worker_env)
            write_sweep(self._folder, self._record)
        return self._record

    def _last_reason(self) -> str:
        rows = self._record["trials"]
        reasons = [str(row["error"] or row["reason"]) for row in rows if row["state"] != "running"]
        return reasons[-1] if reasons else str(self._record["over"] or "none was started")


def _tokens_per_run(recipe: Recipe, prepared: Prepared) -> int:
    """Number of tokens that a whole run of the recipe trains on; at least 1."""
    train = prepared.manifest.train
    steps = recipe.total_steps(train.sequences)
    return max(1, round(recipe.epoch_at(steps, train.sequences) * train.tokens))


class _TimeLimit:
    """Ends the sweep when its time budget is used up."""

    def __init__(self, conductor: Conductor) -> None:
        seconds = conductor.seconds_left
        self._timer = (
            None
            if seconds is None
            else threading.Timer(seconds, conductor.end, ["the time budget is used up"])
        )

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
