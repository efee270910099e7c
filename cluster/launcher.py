"""Where a run trains: in this process, in processes of this machine, or on a Ray cluster."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager

from ..training.common.background import beside
from ..training.common.stop import Stop
from ..training.config.recipe import Recipe
from ..training.engine.task import Job, Outcome
from ..training.launch.local_workers import Processes
from ..training.launch.ray_workers import launch_on_ray
from ..training.launch.resources import Resources, check_fits, demand
from ..training.run import (
    Launch,
    Listener,
    find_finished,
    prepare_data,
    prepare_here,
    prepares_on_ray,
)
from .environment import worker_environment
from .gpus import usable_gpus
from .interrupts import graceful_interrupts
from .nodes.ray_session import cluster_address, ray_session
from .preflight import try_machine, try_running_cluster


def choose_launcher(
    recipe: Recipe,
    listener: Listener,
    stop: Stop,
    *,
    address: str | None,
    verbose: bool,
    wait_for_nodes: float,
) -> AbstractContextManager[Launch | None]:
    """What launches the run's workers, for as long as the context lasts.

    Args:
        recipe: what to run.
        listener: notified of data that is prepared before the workers start.
        stop: requested by a first Ctrl-C or SIGTERM inside the context.
        address: a Ray cluster, or "local"; None reads $RAY_ADDRESS.
        verbose: pass on what workers print.
        wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.

    Returns:
        A context; its value is None where the run trains in this process.

    Raises:
        InputError: the workers do not fit; nothing was started then.
    """
    env = worker_environment(recipe)
    if not recipe.scale.most_workers:
        return _in_this_process(recipe, stop)
    address = cluster_address(address)
    if address is None:
        return _on_this_machine(recipe, listener, stop, env, verbose)
    return _on_ray(recipe, stop, env, address, verbose, wait_for_nodes)


def open_ray(
    recipe: Recipe, address: str | None, env: dict[str, str], verbose: bool
) -> AbstractContextManager[None]:
    """A Ray session with room for the recipe's workers; arguments as `ray_session` takes them."""
    print("starting Ray", file=sys.stderr)
    needed_cpus = recipe.scale.most_workers * recipe.scale.cpus_per_worker + 2
    return ray_session(needed_cpus, address, env, verbose)


def prepare_early(recipes: Sequence[Recipe]) -> "Future[None]":
    """Start to prepare small data in a thread, while Ray starts.

    Data that needs Ray is left out. Later `prepare_data` finds what was prepared.

    Returns:
        Done when all is prepared; its `result()` raises what `prepare_here` raises.
    """
    silent = Listener(lambda _: None, lambda _: None)

    def work() -> None:
        for recipe in recipes:
            if not prepares_on_ray(recipe):
                prepare_here(recipe, silent)

    return beside(work, "prepare")


@contextmanager
def _in_this_process(recipe: Recipe, stop: Stop) -> Iterator[None]:
    try_machine(recipe)
    with graceful_interrupts(stop):
        yield


@contextmanager
def _on_this_machine(
    recipe: Recipe, listener: Listener, stop: Stop, env: dict[str, str], verbose: bool
) -> Iterator[Launch]:
    machine = _this_machine(recipe)
    requested = demand(recipe.scale, [machine])
    workers = check_fits(requested, [machine])
    try_machine(recipe)
    if find_finished(recipe) is None and prepares_on_ray(recipe):
        # Large data is prepared with all cores of this machine.
        with open_ray(recipe, None, env, verbose), graceful_interrupts(stop):
            prepare_data(recipe, listener)
    processes = Processes(recipe.scale, requested, workers, env, verbose)
    with graceful_interrupts(stop), processes:

        def launch(job: Job, tell: Callable[[str], None]) -> Outcome:
            return processes.launch(job, stop, tell)

        yield launch


def _this_machine(recipe: Recipe) -> Resources:
    """CPUs are never too few: workers that share cores are only slower."""
    requested = recipe.scale.most_workers * recipe.scale.cpus_per_worker
    return {"CPU": max(os.cpu_count() or 1, requested), "GPU": usable_gpus()}


@contextmanager
def _on_ray(
    recipe: Recipe,
    stop: Stop,
    env: dict[str, str],
    address: str,
    verbose: bool,
    wait_for_nodes: float,
) -> Iterator[Launch]:
    prepared = prepare_early([recipe])
    # Ray installs its own SIGTERM handler when it starts; ours must come after it.
    with open_ray(recipe, address, env, verbose), graceful_interrupts(stop):
        tried = try_running_cluster(recipe, address, wait_for_nodes)
        prepared.result()

        def launch(job: Job, tell: Callable[[str], None]) -> Outcome:
            return launch_on_ray(job, recipe.scale, stop, tried.worker_env, tell)

        yield launch
