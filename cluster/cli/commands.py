"""What each command does, one function each, named as the command."""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from ...training.common.errors import InputError
from ...training.config.paths import resolve_path
from ...training.config.recipe import Recipe, load_recipe


def check(options: argparse.Namespace) -> None:
    """Validate a recipe and its data, and tell what a run would do."""
    from ..environment import worker_environment
    from ..launcher import open_ray
    from ..preflight import try_running_cluster
    from .check import examine, render

    recipe = _recipe(options)
    outlook = examine(recipe)
    if options.address and recipe.scale.most_workers:
        with open_ray(recipe, options, options.address, worker_environment(recipe)):
            lines = try_running_cluster(recipe, options.address, options.wait_for_nodes).lines
        outlook["cluster"] = [asdict(line) for line in lines]
    print(json.dumps(outlook, indent=2) if options.json else render(outlook))


def prepare(options: argparse.Namespace) -> None:
    """Prepare a recipe's data."""
    from ...training.run import prepare_data, prepares_on_ray
    from ..environment import worker_environment
    from ..launcher import open_ray
    from ..nodes.ray_session import cluster_address
    from .screens.progress import ProgressWatcher

    recipe = _recipe(options)
    env = worker_environment(recipe)
    on_ray = prepares_on_ray(recipe)
    ray = open_ray(recipe, options, cluster_address(options.address), env) if on_ray else None
    with ray or nullcontext(), ProgressWatcher() as watcher:
        prepared = prepare_data(recipe, watcher)
    summary = prepared.manifest.summary()
    if options.json:
        print(json.dumps({"folder": str(prepared.folder), **summary}, indent=2))
    else:
        from .check import render_data

        print(render_data(summary))
        print(f"prepared data: {prepared.folder}")


def train(options: argparse.Namespace) -> None:
    """Train, or go on with an unfinished run."""
    from ...training.common.background import Stop
    from ...training.inspection import inspect_recipe
    from ...training.run import run_folder
    from ...training.run import train as train_run
    from ..launcher import choose_launcher
    from .screens.progress import ProgressWatcher

    recipe = _recipe(options)
    inspect_recipe(recipe)
    stop = Stop()
    with ProgressWatcher() as watcher, choose_launcher(recipe, options, stop, watcher) as launcher:
        record = train_run(recipe, launcher, watcher)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        from .screens.summary import render_summary

        print(render_summary(run_folder(recipe), colour=sys.stdout.isatty()))


def job(options: argparse.Namespace) -> None:
    """Run recipes on a cluster as Ray jobs."""
    from . import job_commands

    getattr(job_commands, options.verb)(options)


def cluster(options: argparse.Namespace) -> None:
    """Start, end and examine a cluster of one's own machines."""
    from . import cluster_commands

    getattr(cluster_commands, options.verb)(options)


def tune(options: argparse.Namespace) -> None:
    """Search for good settings, go on with an unfinished sweep, or show one."""
    from .tune_command import run_sweep, show_sweep

    words = options.sweep
    if words[0] == "show" and len(words) == 2:
        show_sweep(words[1], options)
    elif len(words) == 1:
        run_sweep(Path(words[0]), options)
    else:
        raise InputError(f"tune {' '.join(words)}: expected SWEEP, or show and SWEEP or its folder")


def runs(options: argparse.Namespace) -> None:
    """List the runs of a storage."""
    from ...training.common.storage import Folder
    from ...training.records.run_folder import list_runs
    from .screens.runs import render_runs

    storage = Folder(resolve_path(options.storage, Path.cwd()))
    print(render_runs(list_runs(storage), as_json=options.json))


def report(options: argparse.Namespace) -> None:
    """Write a run's report anew."""
    from ...training.common.storage import Folder
    from ...training.records.report import write_report
    from ...training.records.run_folder import REPORT_FILE

    folder = Folder(resolve_path(options.run, Path.cwd()))
    write_report(folder)
    print(folder / REPORT_FILE)


def k8s_render(options: argparse.Namespace) -> None:
    """Write a recipe as a RayJob."""
    from ...tuning.sweep import is_sweep
    from ..kubernetes.render import Target, render

    if is_sweep(options.recipe):
        raise InputError(
            f"{options.recipe} is a sweep, and k8s render writes runs; start the overlay's "
            "RayCluster and submit the sweep to it: finray job submit"
        )
    target = Target(options.overlay, options.namespace, options.image, options.memory)
    text = render(load_recipe(options.recipe, tuple(options.overrides)), target)
    if options.to is None:
        print(text, end="")
        return
    try:
        options.to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to {options.to}: cannot write the file: {error.strerror}") from None


def export(options: argparse.Namespace) -> None:
    """Write a finished run's result as a folder that loads without finray."""
    from ...training.common.storage import Folder
    from ...training.export.export import export as write_export
    from .screens.export import ExportProgress, render_exported

    run = Folder(resolve_path(options.run, Path.cwd()))
    target = Path(resolve_path(str(options.to), Path.cwd()))
    with ExportProgress() as progress:
        exported = write_export(
            run, target, merge=options.merge, dtype=options.dtype, progress=progress
        )
    print(render_exported(exported, as_json=options.json))


def schema(options: argparse.Namespace) -> None:
    """Print the JSON schema of recipes or sweeps."""
    from ...tuning.sweep import Sweep

    of = Sweep if options.of == "sweep" else Recipe
    print(json.dumps(of.model_json_schema(), indent=2))


def _recipe(options: argparse.Namespace) -> Recipe:
    local = ("scale.workers=0", "scale.strategy=auto") if options.local else ()
    return load_recipe(options.recipe, (*options.overrides, *local))
