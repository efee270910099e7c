"""Where a run trains: in this process, in processes of this machine, or on a Ray cluster."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ..training.common.stop import Stop
from ..training.config.recipe import Recipe
from ..training.engine.task import Job, Outcome
from ..training.launch.local_workers import Processes
from ..training.launch.ray_workers import launch_on_ray
from ..training.launch.resources import Resources, check_fits, demand
from ..training.run import Launch, Listener, find_finished, prepare_data, prepares_on_ray
from .cli.screens.progress import ProgressWatcher
from .early_preparation import prepare_early
from .environment import worker_environment
from .gpus import usable_gpus
from .interrupts import graceful_interrupts
from .nodes.ray_session import cluster_address, ray_session
from .preflight import try_machine, try_running_cluster


def placed(
    recipe: Recipe, options: argparse.Namespace, stop: Stop
) -> AbstractContextManager[Launch | None]:
    """What launches the run's workers, while the context lasts; None where it has none.

    Raises:
        InputError: they do not fit; nothing was started then.
    """
    env = worker_environment(recipe)
    if not recipe.scale.most_workers:
        return _here(recipe, stop)
    address = cluster_address(options.address)
    if address is None:
        return _on_this_machine(recipe, options, stop, env)
    return _on_ray(recipe, options, address, stop, env)


def open_ray(
    recipe: Recipe, options: argparse.Namespace, address: str | None, env: dict[str, str]
) -> AbstractContextManager[None]:
    """Ray with room for the recipe's workers."""
    print("starting Ray", file=sys.stderr)
    needed = recipe.scale.most_workers * recipe.scale.cpus_per_worker + 2
    return ray_session(needed, address, env, options.verbose)


@contextmanager
def _here(recipe: Recipe, stop: Stop) -> Iterator[None]:
    try_machine(recipe)
    with graceful_interrupts(stop):
        yield


@contextmanager
def _on_this_machine(
    recipe: Recipe, options: argparse.Namespace, stop: Stop, env: dict[str, str]
) -> Iterator[Launch]:
    machine = _this_machine(recipe)
    wanted = demand(recipe.scale, [machine])
    workers = check_fits(wanted, [machine])
    try_machine(recipe)
    if find_finished(recipe) is None and prepares_on_ray(recipe):  # with all of its cores
        ray = open_ray(recipe, options, None, env)
        with ray, graceful_interrupts(stop), ProgressWatcher() as watcher:
            prepare_data(recipe, Listener(watcher.phase, watcher.watch))
    processes = Processes(recipe.scale, wanted, workers, env, options.verbose)
    with graceful_interrupts(stop), processes:

        def launch(job: Job, tell: Callable[[str], None]) -> Outcome:
            return processes.launch(job, stop, tell)

        yield launch


def _this_machine(recipe: Recipe) -> Resources:
    """Workers may be more than there are cores: they are slower then, and no more."""
    asked = recipe.scale.most_workers * recipe.scale.cpus_per_worker
    return {"CPU": max(os.cpu_count() or 1, asked), "GPU": usable_gpus()}


@contextmanager
def _on_ray(
    recipe: Recipe,
    options: argparse.Namespace,
    address: str,
    stop: Stop,
    env: dict[str, str],
) -> Iterator[Launch]:
    prepared = prepare_early([recipe])
    # Ray takes SIGTERM for itself when it starts; a run that is told to end saves first.
    with open_ray(recipe, options, address, env), graceful_interrupts(stop):
        tried = try_running_cluster(recipe, address, options.wait_for_nodes)
        prepared.result()

        def launch(job: Job, tell: Callable[[str], None]) -> Outcome:
            return launch_on_ray(job, recipe.scale, stop, tried.worker_env, tell)

        yield launch
