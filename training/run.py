"""One run, as the driver runs it.

    inspect → prepare, and rehearse beside it → compare with an earlier attempt → train → report

All steps but the last two detect errors before a model is loaded.
"""

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common.errors import FinrayError, InputError, Interrupted, RunError
from .common.imports import uncollected
from .common.lock import hold_run_lock
from .common.progress import SILENT, Progress
from .common.secrets import redact
from .common.storage import Folder
from .common.versions import installed_versions
from .common.yaml_text import dump_yaml
from .config.model_folder import model_folder
from .config.places import locates
from .config.recipe import Recipe
from .config.remote_code import code_files
from .config.trackers import programs_of
from .data.curation.report import report_of
from .data.fingerprint import contents_of, fingerprint
from .data.prepare import find_prepared, prepare, storage_errors
from .data.prepared import Prepared
from .data.producing import Producer
from .data.tasks import RunOnRayData, RunTasks, run_in_process
from .data.window_files import WINDOWS_FOLDER, read_counts
from .engine.context import STOP_FILE
from .engine.task import WorkerResult, WorkerTask
from .inspection import inspect_recipe
from .launch.retries import Launcher, run_with_retries
from .models.devices import Room
from .records.checkpoint import best
from .records.identity import Commits, at_commits, check_identity, hub_commits, identity_of
from .records.recorder import now, update_run
from .records.report import write_report
from .records.resume import (
    RunState,
    check_same_data,
    has_checkpoints,
    move_aside,
    schedule_of,
    state_of,
)
from .records.run_folder import (
    CHECKPOINTS_FOLDER,
    PREPARED_FOLDER,
    RECIPE_FILE,
    RUN_FILE,
    Record,
    check_run_folder,
    existing_run,
    read_run,
)
from .records.tracking import lacking, tracked
from .rehearsal.child import Rehearsal, rehearse
from .rehearsal.outcome import Outcome, with_packing
from .rl.row_scores import close_row_scorers, open_row_scorer


def run_folder(recipe: Recipe) -> Folder:
    """The run's folder, <storage>/<name>."""
    return Folder(recipe.storage) / recipe.name


@locates
def state_of_run(recipe: Recipe, *, longer: bool = False) -> RunState:
    """How far a run is, before anything is prepared or started.

    Args:
        recipe: what to run.
        longer: whether steps may be added under a schedule of their own.

    Raises:
        InputError: its folder holds another run, or the recipe names modules that do not exist.
    """
    folder = run_folder(recipe)
    check_run_folder(folder)
    earlier = read_run(folder)
    state = RunState(folder, None)
    if earlier is not None:
        recipe = with_packing(at_commits(recipe, earlier.get("commits")), packed_before(earlier))
        state = state_of(recipe, folder)
        _check_same_files(recipe, folder, earlier)
        check_same_data(folder, earlier, fingerprint(recipe), lambda: contents_of(recipe))
    if state.has_new_length:
        steps = recipe.optim.max_steps
        prepared = (
            None if steps else find_prepared(recipe, Folder(recipe.storage) / PREPARED_FOLDER)
        )
        if prepared is not None:
            steps = recipe.total_steps(prepared.manifest.train.sequences)
        if steps is not None:
            schedule_of(recipe, state, steps, longer)
    if not state.is_finished:
        _check_modules(recipe)
    return state


@locates
def train(
    recipe: Recipe,
    launcher: Launcher,
    progress: Progress = SILENT,
    *,
    longer: bool = False,
    rehearsal: Rehearsal | None = None,
) -> Record:
    """Train a run from its current state to its end; returns run.json.

    Args:
        recipe: what to run.
        launcher: starts the workers.
        progress: receives the progress.
        longer: whether steps may be added under a schedule of their own.
        rehearsal: the recipe's, if it is started already.

    Raises:
        InputError: the recipe or the data is wrong, or does not match the run in the folder.
        RunError: the run failed; its folder contains the progress so far.
        Interrupted: a stop was requested; the progress so far is saved.
    """
    state = state_of_run(recipe, longer=longer)
    folder = state.folder
    if state.record is not None and state.is_finished:
        send_rest(recipe, progress)
        return state.record
    commits = _commits(recipe, state.record)
    recipe = at_commits(recipe, commits)
    with rehearsal or Rehearsal(recipe) as running:
        ready = _prepare_and_rehearse(recipe, running, packed_before(state.record), progress)
    recipe, prepared = ready.recipe, ready.prepared
    check_enough(recipe, prepared)
    total_steps = recipe.total_steps(prepared.manifest.train.sequences)
    schedule = schedule_of(recipe, state, total_steps, longer)
    # If another driver takes over the lock, which is then stale, this one stops.
    with hold_run_lock(folder.create(), launcher.stop.requested, progress) as stale:
        if stale is not None:
            progress.status(f"taking over the lock, whose holder no longer runs: {stale}")
        with tracked(folder, programs_of(recipe.log.to), progress):
            result = run_prepared(
                *(recipe, prepared, launcher, progress),
                schedule=schedule,
                commits=commits,
                outcome=ready.outcome,
            )
    _raise_failure(result, folder)
    return existing_run(folder)


def send_rest(recipe: Recipe, progress: Progress = SILENT) -> None:
    """Send a finished run to those of its trackers that lack something of it."""
    folder = run_folder(recipe)
    late = lacking(folder, programs_of(recipe.log.to))
    if late:
        with hold_run_lock(folder, threading.Event(), progress), tracked(folder, late, progress):
            pass


def start_over(recipe: Recipe, progress: Progress = SILENT) -> Folder | None:
    """Move a run's folder aside, so that the run starts over.

    Returns:
        The old run's new folder; None if there was no run.

    Raises:
        InputError: another driver is training the run.
    """
    folder = run_folder(recipe)
    if not folder.exists():
        return None
    with hold_run_lock(folder, threading.Event(), progress):
        pass
    return move_aside(Folder(recipe.storage), recipe.name)


def at_earlier_commits(recipe: Recipe) -> Recipe:
    """The recipe with what comes from the hub at the commits of the run's first start; as it is for
    a new run. A run.json that cannot be read is refused by `state_of_run`."""
    try:
        earlier = read_run(run_folder(recipe))
    except (InputError, OSError):
        return recipe
    return at_commits(recipe, (earlier or {}).get("commits"))


def at_noted_commits(recipe: Recipe) -> Recipe:
    """The recipe with what comes from the hub at the commits of the run's first start, or at
    today's.

    Raises:
        InputError: the hub does not give a model or data set, or run.json cannot be read.
    """
    return at_commits(recipe, _commits(recipe, read_run(run_folder(recipe))))


def run_prepared(
    recipe: Recipe,
    prepared: Prepared,
    launcher: Launcher,
    progress: Progress = SILENT,
    until: int | None = None,
    schedule: list[int] | None = None,
    commits: Commits | None = None,
    outcome: Outcome | None = None,
) -> WorkerResult:
    """Train a run from its current state, with prepared data; returns how it ended.

    Args:
        recipe: what to run.
        prepared: its data.
        launcher: starts the workers.
        progress: receives the progress.
        until: a step after which to save and stop, before the run's end.
        schedule: the last step of each of its learning-rate schedules; None for a single one.
        commits: the commits of what comes from the hub, to which the recipe refers.
        outcome: of the recipe's rehearsal; None to rehearse it here.

    Raises:
        InputError: the run started from other files.
        RunError: the workers failed too often, or cannot start again.
        InputError: damaged data cannot be prepared again.
    """
    folder = run_folder(recipe)
    earlier = read_run(folder)
    is_finished = earlier is not None and earlier.get("status") == "finished"
    if is_finished and (schedule is None or schedule[-1] == (earlier or {}).get("total_steps")):
        return WorkerResult(status="finished", error=None, exit_code=0)
    if earlier is not None:
        _check_same_files(recipe, folder, earlier)
    outcome = outcome or rehearse(recipe, progress)
    recipe = outcome.allowed(recipe).with_longest(prepared.manifest.longest)
    recipe, decided = _placed(recipe, earlier, launcher.room, progress)
    _record_start(recipe, folder, prepared, schedule, commits or {}, outcome, decided)
    progress.run_started(folder)
    task = WorkerTask(
        recipe=recipe.model_dump(mode="json"),
        run=folder.uri,
        prepared=prepared.folder.uri,
        isolation=outcome.way(prepared.manifest.packing),
        shares_prefixes=outcome.shares_prefixes,
        left_out=list(outcome.left_out),
        until=until,
        schedule=schedule,
    )
    started = time.monotonic()
    try:
        with _windows(recipe, prepared, folder, launcher):
            result = run_with_retries(
                task, launcher, progress, lambda: _prepare_again(recipe, prepared, progress)
            )
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        message = str(error) or type(error).__name__
        _record_end(recipe, folder, status, message, time.monotonic() - started)
        raise
    _record_end(recipe, folder, result["status"], result["error"], time.monotonic() - started)
    if folder.exists(RUN_FILE):
        write_report(folder)
    return result


def _windows(
    recipe: Recipe, prepared: Prepared, folder: Folder, launcher: Launcher
) -> AbstractContextManager[object]:
    """Prepares windows inside, if the recipe's data streams."""
    if not recipe.data.streams:
        return nullcontext()
    return Producer(recipe, prepared, folder / WINDOWS_FOLDER, launcher.run_tasks)


def _placed(
    recipe: Recipe, earlier: Record | None, room: Room | None, progress: Progress
) -> tuple[Recipe, Record]:
    """The recipe with what its GPU's memory decides, and that as run.json keeps it.

    A run goes on as it was first decided, whatever GPU it has now.
    """
    if not recipe.leaves_open:
        return recipe, {}
    before = (earlier or {}).get("decided")
    rows, checkpoints = recipe.microbatch, recipe.model.checkpoints
    if before:
        if recipe.optim.micro_batch_size == "auto":
            rows = before["micro_batch_size"]
        if recipe.model.gradient_checkpointing == "auto":
            checkpoints = before["gradient_checkpointing"]
    elif room is not None and model_folder(recipe.model, only_cached=True) is not None:
        from .models import import_peft  # noqa: F401 - before what loads peft
        from .models.memory_estimate import sizes_of
        from .models.placement import decide

        recipe = decide(recipe, sizes_of(recipe), room)
        rows, checkpoints = recipe.microbatch, recipe.model.checkpoints
        size = recipe.microbatch_setting.replace("=", " ")
        progress.note(
            f"by the estimate of the GPU's memory: {size}, "
            f"model.gradient_checkpointing {str(checkpoints).lower()}"
        )
    decided = {"micro_batch_size": rows, "gradient_checkpointing": checkpoints}
    return recipe.with_placement(rows, checkpoints), decided


def prepares_on_ray(recipe: Recipe) -> bool:
    """True if the data is not prepared yet, is not small, and the run has workers.

    Raises:
        InputError: see `inspect_recipe`.
    """
    if not curates_on_ray(recipe, trains=True):
        return False
    return find_prepared(recipe, Folder(recipe.storage) / PREPARED_FOLDER) is None


@locates
def prepare_data(recipe: Recipe, progress: Progress = SILENT) -> Prepared:
    """The recipe's prepared data set. If it does not exist, prepare it: in this process, or on the
    initialised Ray if `prepares_on_ray` is true.

    Raises:
        InputError: see `inspect_recipe` and `prepare`.
        RunError: a data task on Ray failed.
    """
    return _prepare(recipe, _tasks(recipe, prepares_on_ray(recipe)), progress)


def curates_on_ray(recipe: Recipe, *, trains: bool = False) -> bool:
    """True if the data is not small and does not stream, and the run has workers.

    Args:
        recipe: the recipe.
        trains: whether it is to be trained, so that its rows have to be as many as a batch.

    Raises:
        InputError: see `inspect_recipe`.
    """
    if recipe.data.streams:  # only its first window is made before the workers start
        return False
    is_small = inspect_recipe(recipe, trains=trains).is_small
    return not is_small and recipe.scale.most_workers > 0


@locates
def curate_data(recipe: Recipe, progress: Progress = SILENT) -> dict[str, Any]:
    """Take the recipe's training rows through its stages, without training: in this process, or on
    the initialised Ray if `curates_on_ray` is true.

    Raises:
        InputError: the recipe has no stages; see also `prepare`.
        RunError: a data task on Ray failed, or the storage cannot be written to.
    """
    run_tasks = _tasks(recipe, curates_on_ray(recipe))
    folder = Folder(recipe.storage) / PREPARED_FOLDER
    with storage_errors(folder):
        try:
            return report_of(recipe, folder, run_tasks, progress, open_row_scorer)
        finally:
            close_row_scorers()


@locates
def prepare_here(recipe: Recipe, progress: Progress = SILENT) -> Prepared:
    """As `prepare_data`, but always in this process, and for data that is already inspected.

    Raises:
        InputError: see `prepare`.
    """
    return _prepare(recipe, run_in_process, progress)


@dataclass(frozen=True)
class _Ready:
    """All that a run needs before it takes workers."""

    recipe: Recipe
    """The recipe, with its packing decided."""
    prepared: Prepared
    outcome: Outcome


def _prepare_and_rehearse(
    recipe: Recipe, rehearsal: Rehearsal, packed_before: bool | None, progress: Progress
) -> _Ready:
    """Prepare the data while the rehearsal runs; if it decides otherwise on packing, once more.

    Large data, which is prepared on Ray, waits for the decision.
    """
    guess, prepared = with_packing(recipe, packed_before), None
    if not rehearsal.is_done and not prepares_on_ray(guess):
        prepared = prepare_data(guess, progress)
        if recipe.scale.most_workers == 0:  # this process trains, and is idle until then
            with uncollected():
                from .engine import worker  # noqa: F401
    outcome = rehearsal.outcome(progress)
    decided = outcome.settle(recipe, packed_before)
    if prepared is None or decided.packs != guess.packs:
        prepared = prepare_data(decided, progress)
    for line in outcome.lines(decided):
        progress.note(line)
    return _Ready(decided, prepared, outcome)


def packed_before(record: Record | None) -> bool | None:
    """Whether the data of an earlier attempt is packed; None if there is none."""
    data = (record or {}).get("data") or {}
    packing = data.get("packing")
    return packing if isinstance(packing, bool) else None


def _prepare_again(recipe: Recipe, damaged: Prepared, progress: Progress) -> None:
    """Prepare damaged data again while the run goes on: always here, where no Ray is needed."""
    again = prepare_here(recipe, progress)
    if again.folder != damaged.folder:
        raise InputError(
            f"{damaged.folder}: this prepared data is damaged, and cannot be prepared again: the "
            "data changed since the run was started. Restore the data, or give this run another "
            "name"
        )


def _prepare(recipe: Recipe, run_tasks: RunTasks, progress: Progress) -> Prepared:
    folder = Folder(recipe.storage) / PREPARED_FOLDER
    try:
        return prepare(recipe, folder, run_tasks, progress, open_row_scorer)
    finally:
        close_row_scorers()


def _tasks(recipe: Recipe, on_ray: bool) -> RunTasks:
    return RunOnRayData.within(recipe.scale.prepare) if on_ray else run_in_process


def _names_experts(folder: Path) -> bool:
    """True if the model's configuration mentions experts."""
    return "expert" in (folder / "config.json").read_text(encoding="utf-8")


def _check_modules(recipe: Recipe) -> None:
    """Check the module names of a recipe against a model without weights.

    This loads torch, so it is skipped for a recipe without such names, unless an adapter meets
    experts, which do not take all of its settings. It is also skipped if the model's configuration
    is not on this machine; the workers check the names in any case.

    Raises:
        InputError: a name matches no module, or experts do not take a setting.
    """
    adapter = recipe.adapter
    names_any = recipe.freeze is not None or (
        adapter is not None
        and (
            adapter.targets != "all-linear"
            or bool(adapter.modules_to_save or adapter.rank_pattern or adapter.alpha_pattern)
        )
    )
    folder = model_folder(recipe.model, only_cached=True)
    if folder is not None and (names_any or (recipe.trains_adapter and _names_experts(folder))):
        from .models.loading import count_meta_parameters

        count_meta_parameters(recipe, recipe.method.head)


@locates
def check_enough(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse prepared data with fewer sequences than a step uses.

    Raises:
        InputError: there are too few.
    """
    sequences = prepared.manifest.train.sequences
    if (prepared.manifest.windows or 1) > 1:  # a step may take several windows
        return
    if sequences < recipe.rows_per_step:
        packed = " (packed)" if recipe.packs else ""
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} needs {recipe.rows_per_step} sequences "
            f"per step, but the data has only {sequences}{packed}; lower batch_size, or add data"
        )


def _check_same_files(recipe: Recipe, folder: Folder, earlier: Record) -> None:
    """Refuse to go on from another base, tokenizer, adapter, reference or reward model."""
    if earlier.get("status") == "finished" or has_checkpoints(folder):
        check_identity(earlier.get("identity"), identity_of(recipe), folder)


def _commits(recipe: Recipe, earlier: Record | None) -> Commits:
    """The commits of what comes from the hub; an older finray's runs note none and go on so."""
    if earlier is None:
        return hub_commits(recipe)
    return hub_commits(recipe, earlier["commits"]) if "commits" in earlier else {}


def _record_start(
    recipe: Recipe,
    folder: Folder,
    prepared: Prepared,
    schedule: list[int] | None,
    commits: Commits,
    outcome: Outcome,
    decided: Record,
) -> None:
    identity = identity_of(recipe)
    folder.delete(STOP_FILE)
    folder.write(RECIPE_FILE, dump_yaml(recipe.model_dump(mode="json")).encode())

    def change(record: Record) -> None:
        record.setdefault("started_at", now())
        record.setdefault("step", 0)
        record.setdefault("tokens", 0)
        record.setdefault("metrics", {})
        record.update(
            status="running",
            name=recipe.name,
            method=recipe.method.kind,
            base=recipe.model.base,
            versions=installed_versions(),
            identity=identity,
            commits=commits,
            prepared=prepared.manifest.fingerprint,
            data=prepared.manifest.summary(),
            rehearsal=outcome.as_record(recipe),
            error=None,
            over=None,
            finished_at=None,
            schedule=schedule,
            tags=list(recipe.log.tags),
            **recipe.method.run_facts,
            **({"decided": decided} if decided else {}),
            **({"model_code": code} if (code := code_files(recipe.model)) else {}),
        )

    update_run(folder, change)


def _record_end(
    recipe: Recipe, folder: Folder, status: str, error: str | None, seconds: float
) -> None:
    if not folder.exists(RUN_FILE):  # deleted by the user, who would not want it back
        return

    def change(record: Record) -> None:
        record["status"] = status
        record["error"] = None if error is None else redact(error)
        record["finished_at"] = now()
        record["wall_seconds"] = round(record.get("wall_seconds", 0.0) + seconds, 2)
        counts = read_counts(folder / WINDOWS_FOLDER) if recipe.data.streams else None
        if counts is not None:
            record["streamed"] = counts.summary()
        record["best_checkpoint"] = best(folder / CHECKPOINTS_FOLDER, recipe.watched)

    update_run(folder, change)


def _raise_failure(result: WorkerResult, folder: Folder) -> None:
    if result["status"] == "stopped":
        raise Interrupted(
            f"stopped after saving a checkpoint; the same command resumes the run ({folder})"
        )
    if result["status"] == "failed":
        kind: type[FinrayError] = InputError if result["exit_code"] == 2 else RunError
        raise kind(str(result["error"]))
