"""Where a run trains: in this process, in processes of this machine, or on a Ray cluster."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from ..training.common.background import Stop
from ..training.common.progress import Progress
from ..training.config.recipe import Recipe
from ..training.launch.in_process import InProcessLauncher
from ..training.launch.local_workers import LocalLauncher
from ..training.launch.ray_workers import RayLauncher
from ..training.launch.resources import Resources, check_fits, worker_request
from ..training.launch.retries import Launcher
from ..training.run import find_finished, prepare_data, prepares_on_ray
from .early_preparation import prepare_early
from .environment import worker_environment
from .gpus import usable_gpus
from .interrupts import graceful_interrupts
from .nodes.ray_session import cluster_address, ray_session
from .preflight import try_machine, try_running_cluster


def choose_launcher(
    recipe: Recipe, options: argparse.Namespace, stop: Stop, progress: Progress
) -> AbstractContextManager[Launcher]:
    """Starts the run's workers, for as long as the context lasts.

    Raises:
        InputError: they do not fit; nothing was started then.
    """
    env = worker_environment(recipe)
    if not recipe.scale.most_workers:
        return _here(recipe, stop)
    address = cluster_address(options.address)
    if address is None:
        return _on_this_machine(recipe, options, stop, env, progress)
    return _on_ray(recipe, options, address, stop, env)


def open_ray(
    recipe: Recipe, options: argparse.Namespace, address: str | None, env: dict[str, str]
) -> AbstractContextManager[None]:
    """Ray with room for the recipe's workers."""
    print("starting Ray", file=sys.stderr)
    needed = recipe.scale.most_workers * recipe.scale.cpus_per_worker + 2
    return ray_session(needed, address, env, options.verbose)


@contextmanager
def _here(recipe: Recipe, stop: Stop) -> Iterator[Launcher]:
    try_machine(recipe)
    with graceful_interrupts(stop):
        yield InProcessLauncher(stop)


@contextmanager
def _on_this_machine(
    recipe: Recipe,
    options: argparse.Namespace,
    stop: Stop,
    env: dict[str, str],
    progress: Progress,
) -> Iterator[Launcher]:
    machine = _this_machine(recipe)
    request = worker_request(recipe.scale, [machine])
    workers = check_fits(request, [machine])
    try_machine(recipe)
    if find_finished(recipe) is None and prepares_on_ray(recipe):  # with all of its cores
        with open_ray(recipe, options, None, env), graceful_interrupts(stop):
            prepare_data(recipe, progress)
    local = LocalLauncher(recipe.scale, request, workers, stop, env, options.verbose)
    with graceful_interrupts(stop), local as launcher:
        yield launcher


def _this_machine(recipe: Recipe) -> Resources:
    """More workers than cores are allowed: they are only slower."""
    requested = recipe.scale.most_workers * recipe.scale.cpus_per_worker
    return {"CPU": max(os.cpu_count() or 1, requested), "GPU": usable_gpus()}


@contextmanager
def _on_ray(
    recipe: Recipe,
    options: argparse.Namespace,
    address: str,
    stop: Stop,
    env: dict[str, str],
) -> Iterator[Launcher]:
    prepared = prepare_early([recipe])
    # Ray takes SIGTERM for itself when it starts; a run that is told to end saves first.
    with open_ray(recipe, options, address, env), graceful_interrupts(stop):
        tried = try_running_cluster(recipe, address, options.wait_for_nodes)
        prepared.result()
        with RayLauncher(recipe.scale, stop, tried.worker_env) as launcher:
            yield launcher
