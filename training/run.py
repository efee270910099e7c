"""One run from the driver's side: prepare, launch the workers, tell how it ended.

    inspect → prepare → compare with an earlier attempt → train → report

Whatever can be wrong is found in the first three, before a model is loaded.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from .common.errors import FinrayError, InputError, Interrupted, RunError, last_line
from .common.lock import held
from .common.secrets import redact
from .common.stop import Stop
from .common.storage import Folder
from .common.versions import installed_versions
from .common.yaml_text import dump_yaml, load_yaml
from .config.model_folder import model_folder
from .config.recipe import Recipe, recipe_from_dict
from .config.remote_code import code_files
from .data.prepare import Progress, find_prepared, prepare
from .data.prepared import Prepared
from .data.tasks import RunTasks, run_in_process, run_on_ray_data
from .engine.context import STOP_FILE
from .engine.task import Job, Outcome
from .inspection import inspect_recipe
from .launch.ray_workers import launch_here
from .launch.retries import persevere
from .records.checkpoint import best
from .records.recorder import now, update_run
from .records.report import write_report
from .records.run_folder import CHECKPOINTS_FOLDER, PREPARED_FOLDER, RECIPE_FILE, Record, read_run

# A resumed run may change these; anything else would change its result.
_FREE_ON_RESUME = (
    *("scale", "checkpoint", "eval", "log", "storage"),
    *("optim.micro_batch_size", "optim.max_skipped_steps"),
)


@dataclass(frozen=True)
class Listener:
    """How a run tells the outside what it does."""

    phase: Callable[[str], None]
    """Called with a few words, such as "loading the model"."""
    on_start: Callable[[Folder], None]
    """Called with the run's folder when the workers start: metrics will come."""


class Launch(Protocol):
    """Makes one attempt at a run."""

    def __call__(self, job: Job, tell: Callable[[str], None]) -> Outcome:
        """Train; `tell` is called with a few words on what happens to the workers."""


def run_folder(recipe: Recipe) -> Folder:
    """Where the run lives: <storage>/<name>."""
    return Folder(recipe.storage) / recipe.name


def train(recipe: Recipe, listener: Listener, stop: Stop, launch: Launch | None = None) -> Record:
    """Carry the run to its end, from wherever it stands; returns run.json.

    Args:
        recipe: what to run.
        listener: told what happens.
        stop: requested by whoever wants the run to save and end.
        launch: trains on workers; None for a recipe without any, which trains in this process.

    Raises:
        InputError: the recipe, the data or an earlier attempt forbid it.
        RunError: the run failed; what was reached is in its folder.
        Interrupted: `stop` was requested; what was reached is saved.
    """
    finished = find_finished(recipe)
    if finished is not None:
        return finished
    folder = run_folder(recipe)
    earlier = read_run(folder)
    prepared = prepare_data(recipe, listener)
    _check_enough(recipe, prepared)
    _check_same_data(prepared, folder, earlier)
    # A driver that was silent for so long that another one took over stops.
    with held(folder.create(), stop.requested, listener.phase) as stale:
        if stale is not None:
            listener.phase(f"taking over from {stale}")
        return _carry_out(recipe, folder, prepared, listener, launch or _launch_here(stop))


def find_finished(recipe: Recipe) -> Record | None:
    """run.json of a run that is done; None of one that is still to do.

    Raises:
        InputError: its folder holds another run, or the recipe names modules that are not there.
    """
    folder = run_folder(recipe)
    earlier = read_run(folder)
    if earlier is not None:
        _check_same(recipe, folder)
        if earlier.get("status") == "finished":
            return earlier
    _check_modules(recipe)
    return None


def _carry_out(
    recipe: Recipe,
    folder: Folder,
    prepared: Prepared,
    listener: Listener,
    launch: Launch,
) -> Record:
    _open(recipe, folder, prepared)
    listener.on_start(folder)
    job = _job(recipe, folder, prepared)
    attempt = partial(launch, tell=listener.phase)
    outcome = _keep_books(recipe, folder, lambda: persevere(job, attempt))
    _raise_outcome(outcome, folder)
    record = read_run(folder)
    assert record is not None
    return record


def carry_out(recipe: Recipe, prepared: Prepared, launch: Callable[[Job], Outcome]) -> Record:
    """Carry a run whose data is prepared to its end, from wherever it stands; returns run.json.

    Unlike `train` it raises nothing that the run itself met: that is in the record.

    Args:
        recipe: what to run.
        prepared: its data.
        launch: trains, here or on workers.
    """
    folder = run_folder(recipe)
    earlier = read_run(folder)
    if earlier is None or earlier.get("status") != "finished":
        _open(recipe, folder, prepared)
        job = _job(recipe, folder, prepared)
        _keep_books(recipe, folder, lambda: persevere(job, launch))
    record = read_run(folder)
    assert record is not None
    return record


def _keep_books(recipe: Recipe, folder: Folder, launch: Callable[[], Outcome]) -> Outcome:
    """Launch, and write down how it ended."""
    started = time.monotonic()
    try:
        outcome = launch()
    except BaseException as error:
        status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        told = str(error) or type(error).__name__
        _close(recipe, folder, status, told, time.monotonic() - started)
        raise
    _close(recipe, folder, outcome["status"], outcome["error"], time.monotonic() - started)
    write_report(folder)
    return outcome


def prepares_on_ray(recipe: Recipe) -> bool:
    """Whether the data is still to be prepared, in Ray's tasks: it is not small, and there are
    workers.

    Raises:
        InputError: see `inspect_recipe`.
    """
    is_small = inspect_recipe(recipe).is_small
    if recipe.scale.most_workers == 0 or is_small:
        return False
    return find_prepared(recipe, Folder(recipe.storage) / PREPARED_FOLDER) is None


def prepare_data(recipe: Recipe, listener: Listener) -> Prepared:
    """The recipe's prepared data set, made now where it is not there yet: in this process, or on
    the initialised Ray as `prepares_on_ray` says.

    Raises:
        InputError: see `inspect_recipe` and `prepare`.
    """
    if not prepares_on_ray(recipe):
        return prepare_here(recipe, listener)
    import ray.exceptions

    try:
        return _prepare(recipe, run_on_ray_data, listener)
    except ray.exceptions.RayError as error:
        raise RunError(f"a data task failed: {last_line(error)}") from error


def prepare_here(recipe: Recipe, listener: Listener) -> Prepared:
    """`prepare_data` in this process, of data that was inspected.

    Raises:
        InputError: see `prepare`.
    """
    return _prepare(recipe, run_in_process, listener)


def _prepare(recipe: Recipe, run_tasks: RunTasks, listener: Listener) -> Prepared:
    def progress(state: Progress) -> None:
        listener.phase(f"preparing data: {state.phase} {state.done}/{state.total}")

    return prepare(recipe, Folder(recipe.storage) / PREPARED_FOLDER, run_tasks, progress)


def _check_modules(recipe: Recipe) -> None:
    """Look for the modules that a recipe names, in a model without weights.

    Only where it names any, as this loads torch, and where the model's configuration is on this
    machine; a worker looks in any case.

    Raises:
        InputError: a name matches nothing.
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
        from .models.loading import count_without_weights

        count_without_weights(recipe, recipe.method.head)


def _check_enough(recipe: Recipe, prepared: Prepared) -> None:
    sequences = prepared.manifest.train.sequences
    if sequences < recipe.rows_per_step:
        packed = " (packed)" if recipe.packs else ""
        raise InputError(
            f"optim.batch_size: {recipe.optim.batch_size} takes {recipe.rows_per_step} sequences "
            f"a step, and the data gives only {sequences}{packed}; lower batch_size, or give more "
            "data"
        )


def _check_same(recipe: Recipe, folder: Folder) -> None:
    """Refuse to go on with settings that would make it another run."""
    written = recipe_from_dict(load_yaml(folder.read(RECIPE_FILE)))
    changes = differences(
        written.model_dump(mode="json"), recipe.model_dump(mode="json"), _FREE_ON_RESUME
    )
    if changes:
        raise InputError(
            f"{folder} holds a run with other settings:\n" + "\n".join(changes) + "\n"
            "Give this one another name, or delete that folder."
        )


def differences(before: Any, after: Any, free: tuple[str, ...] = ()) -> list[str]:
    """A line for each setting that differs, but for those whose dotted key begins as in `free`."""
    there, now = _flat(before), _flat(after)
    return [
        f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(there.keys() | now.keys())
        if there.get(key) != now.get(key) and not key.startswith(free)
    ]


def _check_same_data(prepared: Prepared, folder: Folder, earlier: Record | None) -> None:
    fingerprint = prepared.manifest.fingerprint
    if earlier is None or earlier.get("prepared") == fingerprint:
        return
    if any(name.startswith("step-") for name in (folder / CHECKPOINTS_FOLDER).names()):
        raise InputError(
            f"the data changed since {folder} was started (it was {earlier.get('prepared')}, it "
            f"is {fingerprint}): its checkpoints belong to the old data. Restore the data, give "
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


def _open(recipe: Recipe, folder: Folder, prepared: Prepared) -> None:
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


def _close(recipe: Recipe, folder: Folder, status: str, error: str | None, seconds: float) -> None:
    def change(record: Record) -> None:
        record["status"] = status
        record["error"] = None if error is None else redact(error)
        record["finished_at"] = now()
        record["wall_seconds"] = round(record.get("wall_seconds", 0.0) + seconds, 2)
        record["best_checkpoint"] = best(folder / CHECKPOINTS_FOLDER, recipe.method.watched)

    update_run(folder, change)


def _job(recipe: Recipe, folder: Folder, prepared: Prepared) -> Job:
    return Job(recipe=recipe.model_dump(mode="json"), run=folder.uri, prepared=prepared.folder.uri)


def _launch_here(stop: Stop) -> Launch:
    def launch(job: Job, tell: Callable[[str], None]) -> Outcome:
        return launch_here(job, stop)

    return launch


def _raise_outcome(outcome: Outcome, folder: Folder) -> None:
    if outcome["status"] == "stopped":
        raise Interrupted(f"stopped and saved; the same command goes on from there ({folder})")
    if outcome["status"] == "failed":
        kind: type[FinrayError] = InputError if outcome["exit_code"] == 2 else RunError
        raise kind(str(outcome["error"]))
