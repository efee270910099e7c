"""The driver of one sweep.

plan → compare with an earlier attempt → prepare → search → best → report
"""

import math
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict

from ..training.common.background import Stop, run_in_thread
from ..training.common.errors import InputError, Interrupted, RunError, in_one_line
from ..training.common.formatting import count
from ..training.common.lock import hold_run_lock
from ..training.common.storage import Folder
from ..training.config.recipe import Recipe
from ..training.config.trackers import programs_of
from ..training.data.prepared import Prepared
from ..training.engine.context import STOP_FILE
from ..training.models.devices import Room
from ..training.records.checkpoint import choose
from ..training.records.identity import at_commits, check_identity, hub_commits, identity_of
from ..training.records.recorder import now
from ..training.records.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, Record
from ..training.records.tracking import tracked
from .concurrency import decide_concurrency
from .conductor import Conductor
from .distribution import Settings
from .pbt import Population
from .plan import Plan
from .progress import Ending, SweepProgress
from .ray_tune import run_trials
from .rehearsals import Rehearsals
from .report import write_report
from .results import copy, export_best, retrain
from .resume import check_folder, describe
from .samplers import first_rung, interval, make_pruner, make_sampler, parts
from .study import Assignment, StudyFile, SweepStudy
from .sweep_folder import TRIALS_FOLDER, drop_weights, trial_folder, trial_name, write_sweep
from .tracking_program import PROGRAM
from .trial_actor import TrialConfig
from .warm_start import earlier_trials

_RETRY_SECONDS = 2.0
_OF_ANSWERS = ("exact_match",)
_DECIDE_ROWS = ("data.train", "data.eval", "data.curate", "data.mix", "data.holdout")
"""Keys that change which rows are held out, if data.eval does not name them."""


def tune(
    plan: Plan,
    progress: SweepProgress,
    stop: Stop,
    worker_env: dict[str, str],
    room: Room | None = None,
) -> Record:
    """Run a sweep, or resume an earlier attempt at it, on the initialised Ray.

    Args:
        plan: the checked sweep.
        progress: receives events and status lines.
        stop: requested when running trials should save and end.
        worker_env: environment variables for the training processes.
        room: what a trial's GPU offers; None without one.

    Returns:
        sweep.json.

    Raises:
        InputError: the data is invalid, the cluster too small, or the folder holds another sweep.
        RunError: no trial succeeded; sweep.json and the report are written all the same.
        Interrupted: `stop` was requested; the same command resumes it.
    """
    earlier = check_folder(plan)
    place = plan.place("concurrency")
    concurrency = decide_concurrency(plan.sweep.concurrency, plan.recipe.scale, place)
    with hold_run_lock(plan.folder.create(), stop.requested, progress) as stale:
        if stale is not None:
            progress.status(f"taking over the lock, whose holder no longer runs: {stale}")
        plan.folder.delete(STOP_FILE)
        earlier = earlier or {}
        commits = earlier.get("commits")
        for recipe in plan.data_recipes().values():
            commits = hub_commits(recipe, commits)
        rehearsals = Rehearsals(
            plan.combinations,
            lambda settings: at_commits(plan.trial_recipe(settings), commits),
            progress,
        )
        with plan.sweep.locating():
            rehearsals.start(plan.points)
        _check_answers(plan, rehearsals.prepared)
        if (remark := _different_rows(plan, rehearsals.prepared)) is not None:
            progress.note(remark)
        record = {**earlier, "commits": commits}
        sweep = _SweepRun(plan, progress, rehearsals, record, concurrency, worker_env, room)
        with tracked(plan.folder, programs_of(plan.recipe.log.to), progress, PROGRAM):
            return sweep.run(stop)


class _SweepRun:
    """One attempt at a sweep.

    Args:
        plan: the checked sweep.
        progress: receives events and status lines.
        rehearsals: of its trials, which have started.
        record: sweep.json of an earlier attempt, and the commits of what comes from the hub.
        concurrency: number of trials that run at the same time.
        worker_env: environment variables of the workers.
        room: what a trial's GPU offers.
    """

    def __init__(
        self,
        plan: Plan,
        progress: SweepProgress,
        rehearsals: Rehearsals,
        record: Record,
        concurrency: int,
        worker_env: dict[str, str],
        room: Room | None,
    ) -> None:
        self._plan = plan
        self._room = room
        self._progress = progress
        self._rehearsals = rehearsals
        self._record = record
        self._concurrency = concurrency
        self._worker_env = worker_env
        self._folder = plan.folder
        self._trial_tokens = _tokens_per_run(plan.recipe, rehearsals.prepared[0])
        self._record_start()
        self._file = StudyFile(plan.folder)
        with plan.sweep.locating():
            self._study = self._open_study()
        population = None
        if plan.is_population:
            population = Population(plan.sweep, self._study, plan.space, self._inherit)
        self._conductor = Conductor(
            plan.sweep,
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
                self._record.update(status="failed", error=in_one_line(error), finished_at=now())
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
            prepared=sorted({data.manifest.fingerprint for data in self._rehearsals.prepared}),
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
            plan.sweep.seed,
            self._rehearsals.refusal,
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
        recipe = self._with_noted_files(recipe)
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

    def _with_noted_files(self, recipe: Recipe) -> Recipe:
        """The recipe with its hub models at the sweep's commits; trials share what they start from.

        Raises:
            InputError: a base, reference or reward has changed since the sweep's first trial.
        """
        commits = hub_commits(recipe, self._record.get("commits"))
        recipe = at_commits(recipe, commits)
        noted, present = self._record.get("identity") or {}, identity_of(recipe)
        check_identity(noted, present, self._folder)
        self._record.update(commits=commits, identity={**noted, **present})
        return recipe

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
        ready = self._rehearsals.ready(assignment.settings)
        prepared = ready.prepared
        recipe = self._recipe(assignment.number, assignment.settings, prepared)
        return TrialConfig(
            number=assignment.number,
            recipe=recipe.model_dump(mode="json"),
            prepared=prepared.folder.uri,
            rehearsal=ready.outcome.to_json(),
            sweep=self._folder.uri,
            env=self._worker_env,
            room=None if self._room is None else asdict(self._room),
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
                f"cannot write to {self._folder}, trying again later: {in_one_line(error)}"
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
            refused = {row["error"] for row in rows} <= self._rehearsals.refusals
            kind = InputError if rows and refused else RunError
            raise kind(f"no trial finished with a result: {self._last_reason()}")
        if self._plan.sweep.retrain is not None:
            retrain(self._plan, self._record, self._progress, stop, self._worker_env, self._room)
            write_sweep(self._folder, self._record)
        return self._record

    def _last_reason(self) -> str:
        rows = self._record["trials"]
        reasons = [str(row["error"] or row["reason"]) for row in rows if row["state"] != "running"]
        return reasons[-1] if reasons else str(self._record["over"] or "none was started")


def _check_answers(plan: Plan, prepared: Iterable[Prepared]) -> None:
    """Refuse exact_match as an objective if the data holds no answers to compare with."""
    compares = any(metric.name == "exact_match" for metric in plan.metrics)
    if compares and not all(data.manifest.samples for data in prepared):
        raise InputError(
            f"{plan.place('objective')}: objective: no held-out row has both a prompt and an "
            "answer, so no run reports exact_match; add such rows, or choose another objective"
        )


def _different_rows(plan: Plan, prepared: Iterable[Prepared]) -> str | None:
    """What to say if the objective of trials is measured on different held-out rows."""
    measured = [m.name for m in plan.metrics if m.name.startswith("eval_") or m.name in _OF_ANSWERS]
    tokens = {split.tokens for data in prepared if (split := data.manifest.eval)}
    if not measured or len(tokens) < 2 or not _choose_rows(plan):
        return None
    return (
        f"{measured[0]} is measured on different held-out rows ({count(min(tokens))} to "
        f"{count(max(tokens))} tokens), as the searched settings change these, too; "
        "data.eval names rows that data.curate and data.mix leave as they are"
    )


def _choose_rows(plan: Plan) -> bool:
    """True if searched keys change which rows are held out, and not only their tokens."""
    deciding = ("data.eval",) if plan.recipe.data.eval else _DECIDE_ROWS
    return any(key == "data" or key.startswith(deciding) for key in plan.space.keys)


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
