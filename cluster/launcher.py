"""Where a run trains: in this process, in processes of this machine, or on a Ray cluster."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager

from ..training.common.background import Stop, run_in_thread
from ..training.common.progress import Progress
from ..training.config.recipe import Recipe
from ..training.launch.in_process import InProcessLauncher
from ..training.launch.local_workers import LocalLauncher
from ..training.launch.ray_workers import RayLauncher
from ..training.launch.resources import Resources, check_fits, worker_request
from ..training.launch.retries import Launcher
from ..training.run import find_finished, prepare_data, prepare_here, prepares_on_ray
from .environment import worker_environment
from .gpus import usable_gpus
from .interrupts import graceful_interrupts
from .nodes.ray_session import cluster_address, ray_session
from .preflight import try_machine, try_running_cluster


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
        address: a Ray cluster, or "local"; None reads $RAY_ADDRESS.
        verbose: pass on what workers print.
        wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.

    Raises:
        InputError: the workers do not fit; nothing was started then.
    """
    env = worker_environment(recipe)
    if not recipe.scale.most_workers:
        return _in_this_process(recipe, stop)
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


@contextmanager
def _in_this_process(recipe: Recipe, stop: Stop) -> Iterator[Launcher]:
    try_machine(recipe)
    with graceful_interrupts(stop):
        yield InProcessLauncher(stop)


@contextmanager
def _on_this_machine(
    recipe: Recipe, stop: Stop, progress: Progress, env: dict[str, str], verbose: bool
) -> Iterator[Launcher]:
    machine = _this_machine(recipe)
    request = worker_request(recipe.scale, [machine])
    workers = check_fits(request, [machine])
    try_machine(recipe)
    if find_finished(recipe) is None and prepares_on_ray(recipe):
        # Large data is prepared with all cores of this machine.
        with open_ray(recipe, progress, None, env, verbose), graceful_interrupts(stop):
            prepare_data(recipe, progress)
    local = LocalLauncher(recipe.scale, request, workers, stop, env, verbose)
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
        tried = try_running_cluster(recipe, address, wait_for_nodes)
        prepared.result()
        with RayLauncher(recipe.scale, stop, tried.worker_env) as launcher:
            yield launcher
