"""Where a run trains: in this process, in processes of this machine, or on a Ray cluster."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ..training.common.background import Stop, run_in_thread
from ..training.common.errors import InputError
from ..training.common.progress import Progress
from ..training.config.recipe import Recipe
from ..training.launch.in_process import InProcessLauncher
from ..training.launch.local_workers import LocalLauncher
from ..training.launch.ray_workers import RayLauncher
from ..training.launch.resources import Resources, check_fits, worker_request
from ..training.launch.retries import Launcher
from ..training.models.devices import Room, check_device
from ..training.run import at_noted_commits, prepare_data, prepare_here, prepares_on_ray
from .environment import worker_environment
from .gpus import kind_here, usable_gpus, visible_gpus
from .interrupts import graceful_interrupts
from .nodes.ray_session import cluster_address, ray_session
from .preflight import has_room, try_machine, try_running_cluster


def choose_launcher(
    recipe: Recipe,
    stop: Stop,
    progress: Progress,
    *,
    address: str | None,
    verbose: bool,
    wait_for_nodes: float,
) -> AbstractContextManager[Launcher]:
    """The launcher of the run's workers, for as long as the context lasts.

    Args:
        recipe: what to run.
        stop: requested by a first Ctrl-C or SIGTERM inside the context.
        progress: receives what happens before the workers start.
        address: a Ray cluster, or "local"; None reads $FINRAY_ADDRESS, then $RAY_ADDRESS.
        verbose: pass on what workers print.
        wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.

    Raises:
        InputError: the workers do not fit; nothing was started then.
    """
    env = worker_environment(recipe)
    recipe = at_noted_commits(recipe)
    if not recipe.scale.most_workers:
        return _in_this_process(recipe, stop, progress)
    address = cluster_address(address)
    if address is None:
        return _on_this_machine(recipe, stop, progress, env, verbose)
    return _on_ray(recipe, stop, progress, env, address, verbose, wait_for_nodes)


def open_ray(
    recipe: Recipe, progress: Progress, address: str | None, env: dict[str, str], verbose: bool
) -> AbstractContextManager[None]:
    """A Ray session with room for the recipe's workers; arguments as `ray_session` takes them."""
    progress.status("starting Ray")
    needed_cpus = recipe.scale.most_workers * recipe.scale.cpus_per_worker + 2
    return ray_session(needed_cpus, address, env, verbose)


def prepare_early(recipes: Sequence[Recipe]) -> "Future[None]":
    """Start to prepare small data in a thread, while Ray starts.

    Data that needs Ray is left out. Later `prepare_data` finds what was prepared.

    Returns:
        Done when all is prepared; its `result()` raises what `prepare_here` raises.
    """

    def work() -> None:
        for recipe in recipes:
            if not prepares_on_ray(recipe):
                prepare_here(recipe)

    return run_in_thread(work, "prepare")


@dataclass(frozen=True)
class MachineFit:
    """What a run gets of this machine."""

    workers: int
    """Number of its workers; 0 if it trains in this process."""
    room: Room | None
    """What the GPU of each offers."""


def check_machine(recipe: Recipe, progress: Progress) -> MachineFit:
    """Check this machine for a run without a cluster; returns what the run gets of it.

    Raises:
        InputError: finray does not train on its GPUs, the workers do not fit, the model does not
            fit into a GPU's memory, or its type needs a GPU and there is none.
    """
    workers, kind = 0, kind_here()
    with recipe.locating():
        check_device(recipe, "cpu" if recipe.scale.gpus_per_worker == 0 else kind, kind)
        _check_slices(recipe)
    if recipe.scale.most_workers:
        machine = _this_machine(recipe)
        with recipe.locating():
            workers = check_fits(worker_request(recipe.scale, [machine]), [machine])
    _note_idle_gpus(recipe, workers, progress)
    tried = try_machine(recipe, progress)
    if recipe.model.dtype == "float16":  # the one type that a machine may not compute in
        from ..training.models.dtypes import choose_dtype

        choose_dtype(recipe.model)
    return MachineFit(workers, tried.room)


def _check_slices(recipe: Recipe) -> None:
    """Refuse several workers on MIG slices: a process sees one, and NCCL joins none.

    Raises:
        InputError: there are several, and this machine's GPUs are slices.
    """
    if recipe.scale.least_workers < 2 or recipe.scale.gpus_per_worker == 0:
        return
    if slices := [gpu for gpu in visible_gpus() if gpu.is_slice]:
        raise InputError(
            f"scale.workers: the GPUs here are MIG slices ({slices[0]}), which workers cannot "
            "exchange gradients between; set 1, or switch MIG off"
        )


def _note_idle_gpus(recipe: Recipe, workers: int, progress: Progress) -> None:
    """Say which GPUs of this machine the run leaves idle."""
    there, used = usable_gpus(), max(1, workers)
    if there > used and recipe.scale.gpus_per_worker != 0:
        whole = f"scale.workers={there}" if workers else f"scale.workers={there} without --local"
        which = "the first" if used == 1 else f"the first {used}"
        progress.note(f"{there} GPUs are visible, and this run uses {which}; {whole} uses all")


@contextmanager
def _in_this_process(recipe: Recipe, stop: Stop, progress: Progress) -> Iterator[Launcher]:
    fit = check_machine(recipe, progress)
    with graceful_interrupts(stop):
        yield InProcessLauncher(stop, room=fit.room)


@contextmanager
def _on_this_machine(
    recipe: Recipe, stop: Stop, progress: Progress, env: dict[str, str], verbose: bool
) -> Iterator[Launcher]:
    request = worker_request(recipe.scale, [_this_machine(recipe)])
    fit = check_machine(recipe, progress)
    if prepares_on_ray(recipe):
        # Large data is prepared with all cores of this machine.
        with open_ray(recipe, progress, None, env, verbose), graceful_interrupts(stop):
            prepare_data(recipe, progress)
    local = LocalLauncher(
        *(recipe.scale, request, fit.workers, stop, env, verbose, kind_here(), fit.room)
    )
    with graceful_interrupts(stop), local as launcher:
        yield launcher


def _this_machine(recipe: Recipe) -> Resources:
    """CPUs are never too few: workers that share cores are only slower."""
    requested = recipe.scale.most_workers * recipe.scale.cpus_per_worker
    return {"CPU": max(os.cpu_count() or 1, requested), "GPU": usable_gpus()}


@contextmanager
def _on_ray(
    recipe: Recipe,
    stop: Stop,
    progress: Progress,
    env: dict[str, str],
    address: str,
    verbose: bool,
    wait_for_nodes: float,
) -> Iterator[Launcher]:
    prepared = prepare_early([recipe])
    # Ray installs its own SIGTERM handler when it starts; ours must come after it.
    with open_ray(recipe, progress, address, env, verbose), graceful_interrupts(stop):
        # Nodes with GPUs are waited for last: what is refused needs none.
        prepared.result()
        large = prepares_on_ray(recipe)
        if large and wait_for_nodes and not has_room(recipe):
            # Before nodes with GPUs are asked for, which would lie idle meanwhile.
            prepare_data(recipe, progress)
        tried = try_running_cluster(recipe, address, wait_for_nodes, progress)
        if large:
            prepare_data(recipe, progress)
        with RayLauncher(recipe.scale, stop, tried.worker_env, room=tried.room) as launcher:
            yield launcher
