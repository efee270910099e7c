"""One run, as the driver runs it.

    inspect → prepare → compare with an earlier attempt → train → report

The first three steps detect errors before a model is loaded.
"""

import time
from typing import Any

from .common.errors import FinrayError, InputError, Interrupted, RunError
from .common.lock import hold_run_lock
from .common.progress import SILENT, Progress
from .common.secrets import redact
from .common.storage import Folder
from .common.versions import installed_versions
from .common.yaml_text import dump_yaml, load_yaml
from .config.model_folder import model_folder
from .config.recipe import Recipe, recipe_from_dict
from .config.remote_code import code_files
from .data.prepare import find_prepared, prepare
from .data.prepared import Prepared
from .data.tasks import RunTasks, run_in_process, run_on_ray_data
from .engine.context import STOP_FILE
from .engine.task import WorkerResult, WorkerTask
from .inspection import inspect_recipe
from .launch.retries import Launcher, run_with_retries
from .records.checkpoint import best
from .records.recorder import now, update_run
from .records.report import write_report
from .records.run_folder import (
    CHECKPOINTS_FOLDER,
    PREPARED_FOLDER,
    RECIPE_FILE,
    Record,
    existing_run,
    read_run,
)

# A resumed run may change these; anything else would change its result.
_FREE_ON_RESUME = (
    *("scale", "checkpoint", "eval", "log", "storage"),
    *("optim.micro_batch_size", "optim.max_skipped_steps"),
)


def run_folder(recipe: Recipe) -> Folder:
    """The run's folder, <storage>/<name>."""
    return Folder(recipe.storage) / recipe.name


def train(recipe: Recipe, launcher: Launcher, progress: Progress = SILENT) -> Record:
    """Train a run from its current state to its end; returns run.json.

    Args:
        recipe: what to run.
        launcher: starts the workers.
        progress: receives the progress.

    Raises:
        InputError: the recipe or the data is wrong, or does not match the run in the folder.
        RunError: the run failed; its folder contains the progress so far.
        Interrupted: a stop was requested; the progress so far is saved.
    """
    finished = find_finished(recipe)
    if finished is not None:
        return finished
    folder = run_folder(recipe)
    earlier = read_run(folder)
    prepared = prepare_data(recipe, progress)
    _check_enough(recipe, prepared)
    _check_same_data(prepared, folder, earlier)
    # If another driver takes over the lock, which is then stale, this one stops.
    with hold_run_lock(folder.create(), launcher.stop.requested, progress) as stale:
        if stale is not None:
            progress.status(f"taking over the lock, whose holder no longer runs: {stale}")
        result = run_prepared(recipe, prepared, launcher, progress)
    _raise_failure(result, folder)
    return existing_run(folder)


def find_finished(recipe: Recipe) -> Record | None:
    """run.json of a finished run; None if it is not finished.

    Raises:
        InputError: its folder contains another run, or the recipe names modules that do not exist.
    """
    folder = run_folder(recipe)
    earlier = read_run(folder)
    if earlier is not None:
        _check_same(recipe, folder)
        if earlier.get("status") == "finished":
            return earlier
    _check_modules(recipe)
    return None


def run_prepared(
    recipe: Recipe,
    prepared: Prepared,
    launcher: Launcher,
    progress: Progress = SILENT,
    until: int | None = None,
) -> WorkerResult:
    """Train a run from its current state, with prepared data; returns how it ended.

    Args:
        recipe: what to run.
        prepared: its data.
        launcher: starts the workers.
        progress: receives the progress.
        until: a step after which to save and stop, before the run's end.

    Raises:
        RunError: the workers failed too often, or cannot start again.
    """
    folder = run_folder(recipe)
    earlier = read_run(folder)
    if earlier is not None and earlier.get("status") == "finished":
        return WorkerResult(status="finished", error=None, exit_code=0)
    _record_start(recipe, folder, prepared)
    progress.run_started(folder)
    task = WorkerTask(
        recipe=recipe.model_dump(mode="json"),
        run=folder.uri,
        prepared=prepared.folder.uri,
        until=until,
    )
    started = time.monotonic()
    try:
        result = run_with_retries(task, launcher, progress)
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        message = str(error) or type(error).__name__
        _record_end(recipe, folder, status, message, time.monotonic() - started)
        raise
    _record_end(recipe, folder, result["status"], result["error"], time.monotonic() - started)
    write_report(folder)
    return result


def prepares_on_ray(recipe: Recipe) -> bool:
    """True if the data is not prepared yet, is not small, and the run has workers.

    Raises:
        InputError: see `inspect_recipe`.
    """
    is_small = inspect_recipe(recipe).is_small
    if recipe.scale.most_workers == 0 or is_small:
        return False
    return find_prepared(recipe, Folder(recipe.storage) / PREPARED_FOLDER) is None


def prepare_data(recipe: Recipe, progress: Progress = SILENT) -> Prepared:
    """The recipe's prepared data set. If it does not exist, prepare it: in this process, or on the
    initialised Ray if `prepares_on_ray` is true.

    Raises:
        InputError: see `inspect_recipe` and `prepare`.
        RunError: a data task on Ray failed.
    """
    on_ray = prepares_on_ray(recipe)
    return _prepare(recipe, run_on_ray_data if on_ray else run_in_process, progress)


def prepare_here(recipe: Recipe, progress: Progress = SILENT) -> Prepared:
    """As `prepare_data`, but always in this process, and for data that is already inspected.

    Raises:
        InputError: see `prepare`.
    """
    return _prepare(recipe, run_in_process, progress)


def _prepare(recipe: Recipe, run_tasks: RunTasks, progress: Progress) -> Prepared:
    return prepare(recipe, Folder(recipe.storage) / PREPARED_FOLDER, run_tasks, progress)


def _check_modules(recipe: Recipe) -> None:
    """Check the module names of a recipe against a model without weights.

    This loads torch, so it is skipped for a recipe without such names. It is also skipped if the
    model's configuration is not on this machine; the workers check the names in any case.

    Raises:
        InputError: a name matches no module.
    """
    adapter = recipe.adapter
    names_any = recipe.freeze is not None or (
        adapter is not None
        and (
            adapter.targets != "all-linear"
            or bool(adapter.modules_to_save or adapter.rank_pattern or adapter.alpha_pattern)
        )
    )
    if names_any and model_folder(recipe.model, only_cached=True) is not None:
        from .models.loading import count_meta_parameters

        count_meta_parameters(recipe, recipe.method.head)


def _check_enough(recipe: Recipe, prepared: Prepared) -> None:
    sequences = prepared.manifest.train.sequences
    if sequences < recipe.rows_per_step:
        packed = " (packed)" if recipe.packs else ""
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} needs {recipe.rows_per_step} sequences "
            f"per step, but the data has only {sequences}{packed}; lower batch_size, or add data"
        )


def _check_same(recipe: Recipe, folder: Folder) -> None:
    """Refuse to resume with settings that would change the result."""
    written = recipe_from_dict(load_yaml(folder.read(RECIPE_FILE)))
    changes = differences(
        written.model_dump(mode="json"), recipe.model_dump(mode="json"), _FREE_ON_RESUME
    )
    if changes:
        raise InputError(
            f"{folder} holds a run with other settings:\n" + "\n".join(changes) + "\n"
            "Give this run another name, or delete that folder."
        )


def differences(before: Any, after: Any, free: tuple[str, ...] = ()) -> list[str]:
    """A line for each setting that differs, except keys that start with an item of `free`."""
    old, new = _flat(before), _flat(after)
    return [
        f"  {key}: {old.get(key)!r} before, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def _check_same_data(prepared: Prepared, folder: Folder, earlier: Record | None) -> None:
    fingerprint = prepared.manifest.fingerprint
    if earlier is None or earlier.get("prepared") == fingerprint:
        return
    if any(name.startswith("step-") for name in (folder / CHECKPOINTS_FOLDER).names()):
        raise InputError(
            f"the data changed since {folder} was started (from {earlier.get('prepared')} "
            f"to {fingerprint}): its checkpoints belong to the old data. Restore the data, give "
            "this run another name, or delete that folder."
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list) and any(isinstance(item, dict) for item in values):
        items = {str(index): item for index, item in enumerate(values)}.items()
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _record_start(recipe: Recipe, folder: Folder, prepared: Prepared) -> None:
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
            prepared=prepared.manifest.fingerprint,
            data=prepared.manifest.summary(),
            error=None,
            finished_at=None,
            **recipe.method.run_facts,
            **({"model_code": code} if (code := code_files(recipe.model)) else {}),
        )

    update_run(folder, change)


def _record_end(
    recipe: Recipe, folder: Folder, status: str, error: str | None, seconds: float
) -> None:
    def change(record: Record) -> None:
        record["status"] = status
        record["error"] = None if error is None else redact(error)
        record["finished_at"] = now()
        record["wall_seconds"] = round(record.get("wall_seconds", 0.0) + seconds, 2)
        record["best_checkpoint"] = best(folder / CHECKPOINTS_FOLDER, recipe.method.watched)

    update_run(folder, change)


def _raise_failure(result: WorkerResult, folder: Folder) -> None:
    if result["status"] == "stopped":
        raise Interrupted(
            f"stopped after saving a checkpoint; the same command resumes the run ({folder})"
        )
    if result["status"] == "failed":
        kind: type[FinrayError] = InputError if result["exit_code"] == 2 else RunError
        raise kind(str(result["error"]))
