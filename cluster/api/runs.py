"""One run, from Python: check, prepare, train, list and export."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...training.common.background import Stop
from ...training.common.errors import InputError
from ...training.common.progress import SILENT, Progress
from ...training.common.scratch import scratch_folder
from ...training.common.storage import Folder
from ...training.config.default_storage import default_storage
from ...training.config.paths import resolve_path
from ...training.config.places import locates
from ...training.config.recipe import Recipe
from ...training.config.user_code import try_import
from ...training.inspection import check_log, check_storage, inspect_recipe
from ...training.records.resume import RunState
from ...training.records.run_folder import finished_run, list_runs
from ...training.rehearsal.child import Rehearsal
from ...training.run import (
    at_earlier_commits,
    curate_data,
    curates_on_ray,
    packed_before,
    prepare_data,
    prepares_on_ray,
    run_folder,
    send_rest,
    start_over,
    state_of_run,
)
from ...training.run import train as run_to_the_end
from ...tuning.sweep import is_sweep
from ..environment import worker_environment
from ..launcher import check_machine, choose_launcher, open_ray
from ..nodes.address import ray_address
from ..nodes.ray_session import cluster_address
from ..preflight import try_running_cluster
from ..screens.progress import ProgressWatcher
from .outlook import examine
from .recipes import Changes, RecipeSource, prepare_process, read, source_of
from .results import PreparedData, RunResult
from .sweeps import check_sweep

if TYPE_CHECKING:
    from ...training.export.export import ExportSummary


def check(
    recipe: RecipeSource,
    changes: Changes = (),
    *,
    local: bool = False,
    address: str | None = None,
    wait_for_nodes: float = 0.0,
    fresh: bool = False,
    longer: bool = False,
    verbose: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Check all that `train` checks before its first step; nothing is trained.

    Small data is prepared, which a later `train` uses. A sweep is checked as well as a recipe.

    Args:
        recipe, changes, local, address, wait_for_nodes, fresh, longer, verbose, quiet: as in
            `train`. Only a given `address` makes it look at a cluster.

    Returns:
        What a run would read, hold and do, as plain values: `sources`, `data` (tokens and
        sequences), `steps`, `parameters`, `memory` (bytes), `machine` (what is worth a note about
        this machine, such as the nearest settings that fit its GPUs) and `folder`.

    Raises:
        InputError: the recipe cannot run; with place, key and remedy.
    """
    prepare_process()
    source = source_of(recipe)
    if is_sweep(source):
        settings, outlook = check_sweep(source, changes, local=local)
    else:
        settings = read(recipe, changes, local=local)
        try_import(settings)
        outlook = examine(settings, fresh=fresh, longer=longer)
    where = ray_address(address)
    if not settings.scale.most_workers or (where or cluster_address(None)) is None:
        notes = _Notes()
        check_machine(settings, notes)
        outlook["machine"] = notes.texts
    elif where:
        env = worker_environment(settings)
        with _display(quiet) as progress, open_ray(settings, progress, where, env, verbose):
            lines = try_running_cluster(settings, where, wait_for_nodes, progress).lines
        outlook["cluster"] = [asdict(line) for line in lines]
    return outlook


def prepare(
    recipe: RecipeSource,
    changes: Changes = (),
    *,
    local: bool = False,
    address: str | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """Read, tokenise and pack a recipe's data, without training; done already, it is only opened.

    Args:
        recipe, changes, local, address, verbose, quiet: as in `train`.

    Raises:
        InputError: the recipe or the data is wrong.
        RunError: a data task on Ray failed.
    """
    prepare_process()
    settings = read(recipe, changes, local=local)
    inspect_recipe(settings)
    check_storage(settings)
    where = cluster_address(address)
    with _display(quiet) as progress:
        with Rehearsal(settings) as rehearsal:
            settings = _rehearsed(settings, rehearsal, None, progress)
        with _ray_if(prepares_on_ray(settings), settings, progress, where, verbose):
            prepared = prepare_data(settings, progress)
    return PreparedData(str(prepared.folder), prepared.manifest.summary())


def report_data(
    recipe: RecipeSource,
    changes: Changes = (),
    *,
    local: bool = False,
    address: str | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Take a recipe's training rows through its stages, without training; what is done is kept for
    a later `prepare` or `train`. Of data that streams, only the first window is taken.

    Args:
        recipe, changes, local, address, verbose, quiet: as in `train`.

    Returns:
        `funnel`: of each stage its rows before and after, why rows were dropped, and samples.
        `bad_rows`: place and reason of the first rows that cannot be used.
        `sources`: of each its rows, those left, its weight and its share. `windows`: of an epoch,
        None for data that does not stream.

    Raises:
        InputError: the recipe or the data is wrong, or the recipe has no stages.
        RunError: a data task on Ray failed.
    """
    prepare_process()
    settings = read(recipe, changes, local=local)
    try_import(settings)
    check_storage(settings)
    where = cluster_address(address)
    needed = curates_on_ray(settings)
    with _display(quiet) as progress, _ray_if(needed, settings, progress, where, verbose):
        return curate_data(settings, progress)


def train(
    recipe: RecipeSource,
    changes: Changes = (),
    *,
    local: bool = False,
    address: str | None = None,
    wait_for_nodes: float = 0.0,
    fresh: bool = False,
    longer: bool = False,
    verbose: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train a run, or continue an unfinished one; blocks until it ends.

    Args:
        recipe: a YAML file, the settings as a mapping, or a loaded recipe.
        changes: values that override the recipe's, by dotted key, such as
            `{"optim.learning_rate": 1e-4}`.
        local: train in this process instead of in workers (`scale.workers` 0).
        address: a Ray cluster, `HOST:PORT`; `"local"` starts Ray for this call. By default
            a Ray that this process has initialised, then $FINRAY_ADDRESS and $RAY_ADDRESS, else
            processes of this machine. A Ray of the caller's is used and not stopped.
        wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.
        fresh: start over; an earlier run's folder is renamed to the first free of NAME.1, NAME.2.
        longer: steps beyond those of an earlier call get a learning-rate schedule of their own. A
            constant schedule without a longer warm-up needs no such leave.
        verbose: show what the workers print.
        quiet: show no progress.

    Returns:
        The finished run. A run that has finished before is returned as it is.

    Raises:
        InputError: the recipe or the data is wrong, or belongs to another run than the folder's.
        RunError: the run failed; its folder keeps the progress so far.
        Interrupted: Ctrl-C or a notebook's stop button; a checkpoint is saved, and the same call
            continues from it.
    """
    prepare_process()
    settings = read(recipe, changes, local=local)
    if not fresh:
        settings = at_earlier_commits(settings)
    try_import(settings)
    inspection = inspect_recipe(settings)
    check_storage(settings)
    check_log(settings)
    stop = Stop()
    with _display(quiet) as progress:
        state = RunState(run_folder(settings), None)
        if not fresh and (state := state_of_run(settings, longer=longer)).is_finished:
            progress.status(f"{settings.name}: {state.describe()}")
            send_rest(settings, progress)
            return RunResult(state.folder)
        packed = packed_before(state.record)
        with Rehearsal(settings) as rehearsal:
            on_cluster = cluster_address(address) is not None
            if fresh or on_cluster or not inspection.is_small:
                # Nothing is moved aside and no node is asked for by a run that is refused; large
                # data is prepared once.
                settings = _rehearsed(settings, rehearsal, packed, progress)
            place = choose_launcher(
                settings,
                stop,
                progress,
                address=address,
                verbose=verbose,
                wait_for_nodes=wait_for_nodes,
            )
            with place as launcher:
                # Only now: a run that is refused leaves the earlier one in its place.
                if fresh and (old := start_over(settings, progress)) is not None:
                    progress.status(f"the earlier run is in {old}")
                run_to_the_end(settings, launcher, progress, longer=longer, rehearsal=rehearsal)
    return RunResult(run_folder(settings))


def runs(storage: str | os.PathLike[str] | None = None) -> list[RunResult]:
    """The runs of a storage, oldest first; one whose run.json cannot be read is
    there, too, with the status unreadable.

    Args:
        storage: a folder or URI; by default $FINRAY_STORAGE, else `runs`.
    """
    prepare_process()
    folder = _folder(storage or default_storage())
    started = [(str(record.get("started_at") or ""), name) for name, record in list_runs(folder)]
    return [RunResult(folder / name) for _, name in sorted(started)]


def export(
    run: RunResult | str | os.PathLike[str],
    to: str | os.PathLike[str] | None = None,
    *,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    quantize: Literal["nf4", "int8"] | None = None,
    format: Literal["safetensors", "gguf"] = "safetensors",
    llama_cpp: str | os.PathLike[str] | None = None,
    ollama: bool = False,
    push: str | None = None,
    public: bool = False,
    quiet: bool = False,
) -> "ExportSummary":
    """Write a finished run's result as a folder that transformers and PEFT load without finray.

    Args:
        run: the run, or its folder, URI, or name in the default storage.
        to: a new or empty folder; without one it is only pushed.
        merge: merge the adapter into its base.
        dtype: type of a whole model's weights; by default the base's.
        quantize: store a whole model's weights quantised, as bitsandbytes reads them.
        format: gguf: a file for llama.cpp and Ollama, too.
        llama_cpp: a checkout of llama.cpp, whose converter writes that file; without it the folder
            is only ready to be converted.
        ollama: write a Modelfile, with the model's template and stops.
        push: upload it to this repository of the Hugging Face Hub, OWNER/NAME.
        public: let a new repository be public.
        quiet: show no progress.

    Returns:
        The folder, its files and bytes, how the result is loaded, and where it was uploaded.

    Raises:
        InputError: there is no finished run, nothing to merge, no base, or no space on the disk.
        RunError: the result cannot be written, or a merged weight is not finite.
    """
    prepare_process()
    from .housekeeping import find_run

    home = _folder(default_storage())
    folder = Folder(run.uri) if isinstance(run, RunResult) else find_run(os.fspath(run), home)
    problem = _contradiction(format == "gguf", to, quantize, llama_cpp, ollama, push, public)
    if problem:
        raise InputError(problem)
    finished_run(folder)
    # Both load torch, which the other functions here leave to the workers.
    from ...training.export.export import export as write
    from ...training.export.gguf import check_converter
    from ...training.export.publish import reserve, upload
    from ..screens.export import ExportProgress

    script = None if llama_cpp is None else check_converter(Path(llama_cpp))
    with (
        scratch_folder("export") as scratch,
        nullcontext(SILENT) if quiet else ExportProgress() as progress,
    ):
        target = scratch / folder.name if to is None else resolve_path(os.fspath(to), Path.cwd())
        how: dict[str, Any] = {"merge": merge, "dtype": dtype, "quantize": quantize}
        how |= {"for_gguf": format == "gguf", "converter": script, "ollama": ollama}
        if push is not None:
            how["before_writing"] = partial(reserve, push, private=not public)
        exported = write(folder, Path(target), **how, progress=progress)
        if push is None:
            return exported
        progress.status(f"uploading to {push}")
        return replace(exported, pushed=upload(exported.folder, push))


def _contradiction(
    for_gguf: bool,
    to: str | os.PathLike[str] | None,
    quantize: str | None,
    llama_cpp: str | os.PathLike[str] | None,
    ollama: bool,
    push: str | None,
    public: bool,
) -> str:
    """What contradicts itself in the arguments of an export; empty if nothing does."""
    if to is None and push is None:
        return "export needs a folder to write to, or a repository to push to"
    if public and push is None:
        return "--public is for --push OWNER/NAME; add that"
    if quantize is not None and (for_gguf or ollama):
        reader = "--format gguf" if for_gguf else "--ollama"
        return f"--quantize contradicts {reader}, which reads plain weights"
    if llama_cpp is not None and not for_gguf:
        return "--llama-cpp is for --format gguf; add that"
    if for_gguf and llama_cpp is None and to is None:
        return "--format gguf without --llama-cpp needs --to, to convert it from there"
    return ""


class _Notes(Progress):
    """Keeps what is worth a note."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, message: str) -> None:
        self.texts.append(message)


@locates
def _rehearsed(
    recipe: Recipe, rehearsal: Rehearsal, packed: bool | None, progress: Progress
) -> Recipe:
    """The recipe with its packing decided.

    Args:
        recipe: the recipe.
        rehearsal: the recipe's.
        packed: whether an earlier attempt of the run packs.
        progress: receives that it is waited for.
    """
    return rehearsal.outcome(progress).settle(recipe, packed)


def _ray_if(
    needed: bool, settings: Recipe, progress: Progress, where: str | None, verbose: bool
) -> AbstractContextManager[None]:
    """A Ray for data that is too much for this process; else none is started."""
    if not needed:
        return nullcontext()
    return open_ray(settings, progress, where, worker_environment(settings), verbose)


def _display(quiet: bool) -> "nullcontext[Progress] | ProgressWatcher":
    return nullcontext(SILENT) if quiet else ProgressWatcher()


def _folder(place: str | os.PathLike[str]) -> Folder:
    return Folder(resolve_path(os.fspath(place), Path.cwd()))
