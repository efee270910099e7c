"""Checks of a machine or cluster for one recipe, before a worker is started.

A small task on each node reports its versions, reads the model's folder, tries bfloat16 and
writes a file to the storage; a second one looks for the files of all other nodes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..training.common.errors import InputError, in_one_line
from ..training.common.progress import Progress
from ..training.common.secrets import redact
from ..training.common.versions import installed_versions
from ..training.config.model_folder import has_vocabulary, model_folder
from ..training.config.models import ModelSettings
from ..training.config.places import locates
from ..training.config.recipe import Recipe
from ..training.launch.resources import (
    Resources,
    WorkerRequest,
    check_fits,
    cluster_nodes,
    fitting_workers,
    request_from_autoscaler,
    worker_request,
)
from ..training.models.devices import Room, check_torch
from ..training.models.dtypes import probe_bfloat16
from .gpus import Gpu, gpus_here, visible_gpus
from .memory_fit import judge, room_of
from .nodes.probes import DRIVER, Line, node_names, on_every_node, render_lines, try_storage
from .placements import sizes_by_quantisation

_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Preflight:
    """The checks, and what the workers need."""

    lines: tuple[Line, ...]
    worker_env: dict[str, str]
    room: Room | None = None
    """What a worker's GPU offers; None without one, or if its memory is not known."""

    def require_success(self, progress: Progress) -> None:
        """Report warnings.

        Raises:
            InputError: a check failed; the message is the whole table.
        """
        if not all(line.is_good for line in self.lines):
            raise InputError(f"this recipe cannot run here:\n{render_lines(self.lines)}")
        for line in self.lines:
            if line.warns:
                progress.note(f"{line.name}: {line.text}")


@dataclass(frozen=True)
class _NodeReport:
    """What a node reports."""

    versions: dict[str, str]
    model: str | None
    """Why the model cannot be read there; None if it can."""
    env: dict[str, str]
    gpus: tuple[Gpu, ...]


def preflight(recipe: Recipe, wait_seconds: float, progress: Progress) -> Preflight:
    """Check an initialised cluster that this command did not start.

    Args:
        recipe: the recipe, its paths absolute.
        wait_seconds: time to wait for an autoscaler to add missing nodes.
        progress: receives a line about what it waits for.
    """
    fit = _fit(recipe, wait_seconds, progress)
    if not fit.is_good:
        return Preflight((fit,), {})
    reports = _collect(recipe)
    lines: tuple[Line, ...] = (
        fit,
        _versions_line(reports),
        _model_line(recipe, reports),
        try_storage(recipe.storage),
        *memory_lines(recipe, _gpus_of(reports)),
    )
    env: dict[str, str] = {}
    for report in reports.values():
        env.update(report.env)
    if recipe.model.dtype == "bfloat16":
        variables = " ".join(f"{name}={value}" for name, value in env.items())
        text = f"set for the workers: {variables}" if variables else "works on every node"
        lines = (*lines, Line("bfloat16", True, text))
    return Preflight(lines, env, _room(recipe, _gpus_of(reports)))


def _gpus_of(reports: dict[str, _NodeReport]) -> list[Gpu]:
    """GPUs of the nodes, without the driver's, which may be another machine."""
    return [gpu for id, report in reports.items() if id != DRIVER for gpu in report.gpus]


def _room(recipe: Recipe, gpus: Sequence[Gpu]) -> Room | None:
    """What a worker gets of these GPUs."""
    share = recipe.scale.gpus_per_worker
    return None if share == 0 else room_of(gpus, 1.0 if share == "auto" else share)


def room_here(recipe: Recipe) -> Room | None:
    """What a worker gets of this machine's GPUs."""
    return _room(recipe, _own_gpus(recipe))


def _own_gpus(recipe: Recipe) -> tuple[Gpu, ...]:
    """Those of this machine that the run's workers get here."""
    return visible_gpus()[: max(1, recipe.scale.most_workers)]


def memory_lines(recipe: Recipe, gpus: Sequence[Gpu]) -> tuple[Line, ...]:
    """Check whether a worker fits into the memory of these GPUs.

    Returns:
        No line if the run uses no GPU, no size of one is known, or the model's configuration is
        not on this machine.
    """
    share = recipe.scale.gpus_per_worker
    measured = [gpu for gpu in gpus if gpu.bytes]
    if not measured or share == 0 or model_folder(recipe.model, only_cached=True) is None:
        return ()
    sizes = sizes_by_quantisation(recipe)
    verdict = judge(recipe, sizes, measured, 1.0 if share == "auto" else share)
    warns = verdict.fits and verdict.is_tight
    return (Line("memory", verdict.fits, verdict.text, warns),)


@locates
def try_machine(recipe: Recipe, progress: Progress) -> Preflight:
    """Check this machine for a run that stays on it, and report warnings.

    Raises:
        InputError: torch computes on none of the GPUs here, or a check failed; the message is the
            whole table then.
    """
    gpus = _own_gpus(recipe)
    if gpus and recipe.scale.gpus_per_worker != 0:
        check_torch(gpus[0].kind)
    result = Preflight(memory_lines(recipe, gpus), {}, _room(recipe, gpus))
    result.require_success(progress)
    return result


@locates
def try_running_cluster(
    recipe: Recipe, address: str | None, wait_seconds: float, progress: Progress
) -> Preflight:
    """Check the initialised Ray for a run, and report warnings.

    A cluster that was started for this command is checked like a machine, by `try_machine`.

    Raises:
        InputError: a check failed; the message is the whole table.
    """
    if address in (None, "local"):
        return try_machine(recipe, progress)
    progress.status("checking the cluster")
    result = preflight(recipe, wait_seconds, progress)
    result.require_success(progress)
    return result


def has_room(recipe: Recipe) -> bool:
    """True if the run's workers fit on the nodes that the initialised Ray has now."""
    nodes = cluster_nodes()
    request = worker_request(recipe.scale, nodes)
    return fitting_workers(request, nodes) >= request.min


def _fit(recipe: Recipe, wait_seconds: float, progress: Progress) -> Line:
    deadline = time.monotonic() + wait_seconds
    has_requested = False
    while True:
        nodes = cluster_nodes()
        requested = worker_request(recipe.scale, nodes)
        try:
            check_fits(requested, nodes)
        except InputError as error:
            if time.monotonic() >= deadline:
                waited = f" (after waiting {wait_seconds:g} s)" if wait_seconds else ""
                return Line("fits", False, recipe.located(f"{error}{waited}"))
            if not has_requested:
                has_requested = True
                request_from_autoscaler(requested)
                progress.status(f"waiting up to {wait_seconds:g} s for nodes: {error}")
            time.sleep(min(_POLL_SECONDS, wait_seconds))
            continue
        return Line("fits", True, f"{requested}; {_capacity(requested, nodes)}")


def _capacity(requested: WorkerRequest, nodes: Sequence[Resources]) -> str:
    import ray

    most = fitting_workers(requested, nodes)
    free = ray.available_resources()
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    return f"{most} would fit; free now: {cpus:g} CPUs, {gpus:g} GPUs"


def _collect(recipe: Recipe) -> dict[str, _NodeReport]:
    """Reports of the driver and of every node, by name."""
    names = node_names()
    reports = on_every_node(_inspect_node, names, lambda id: (recipe.model,))
    return {DRIVER: _inspect_node(recipe.model), **{names[id]: reports[id] for id in names}}


def _inspect_node(model: ModelSettings) -> _NodeReport:
    """Runs on a node: collect versions, GPUs and whether the model can be read."""
    return _NodeReport(
        versions=installed_versions(),
        model=_unreadable(model),
        env=probe_bfloat16() if model.dtype == "bfloat16" else {},
        gpus=gpus_here(),
    )


def _unreadable(model: ModelSettings) -> str | None:
    """Why the model cannot be read here; None for a hub model that is not downloaded yet."""
    try:
        folder = model_folder(model, only_cached=True)
        if folder is not None and not (folder / "config.json").is_file():
            return f"{folder} has no config.json"
        if folder is not None and not has_vocabulary(folder):
            return f"{folder} has no tokenizer"
    except (OSError, InputError) as error:
        return redact(in_one_line(error))
    return None


def _versions_line(reports: dict[str, _NodeReport]) -> Line:
    driver = reports[DRIVER].versions
    faults = [
        f"{node} has {name} {report.versions[name]}, the driver {driver[name]}"
        for node, report in reports.items()
        for name in driver
        if report.versions[name] != driver[name]
    ]
    same = ", ".join(f"{name} {driver[name]}" for name in driver)
    return Line("versions", not faults, "; ".join(faults) or f"{same} on every node")


def _model_line(recipe: Recipe, reports: dict[str, _NodeReport]) -> Line:
    faults = [f"{node}: {report.model}" for node, report in reports.items() if report.model]
    return Line("model", not faults, "; ".join(faults) or f"{recipe.model.base} on every node")
