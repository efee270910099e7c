"""What each command does, one function each, named as the command."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..training.errors import InputError
from ..training.recipe import Recipe, load_recipe, resolve_path


def check(options: argparse.Namespace) -> None:
    """Validate a recipe and its data, and tell what a run would do."""
    from .check import examine, render

    outlook = examine(_recipe(options))
    print(json.dumps(outlook, indent=2) if options.json else render(outlook))


def prepare(options: argparse.Namespace) -> None:
    """Prepare a recipe's data."""
    from ..training.data.inspection import inspect_data
    from ..training.run import Listener, prepare_data
    from .progress import ProgressWatcher

    recipe = _recipe(options)
    inspect_data(recipe)
    with _ray(recipe, options), ProgressWatcher() as watcher:
        prepared = prepare_data(recipe, Listener(watcher.phase, watcher.watch))
    summary = prepared.manifest.summary()
    if options.json:
        print(json.dumps({"folder": str(prepared.folder), **summary}, indent=2))
    else:
        from .check import render_data

        print(render_data(summary))
        print(f"prepared data: {prepared.folder}")


def train(options: argparse.Namespace) -> None:
    """Train, or go on with an unfinished run."""
    from ..training.data.inspection import inspect_data
    from ..training.stop import Stop
    from .interrupts import graceful_interrupts

    recipe = _recipe(options)
    inspect_data(recipe)
    stop = Stop()
    with graceful_interrupts(stop), _ray(recipe, options):
        from ..training.run import Listener, run_folder
        from ..training.run import train as carry_out
        from .progress import ProgressWatcher

        with ProgressWatcher() as watcher:
            record = carry_out(recipe, Listener(watcher.phase, watcher.watch), stop)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        from .summary import render_summary

        print(render_summary(run_folder(recipe), colour=sys.stdout.isatty()))


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
    from ..training.run_folder import list_runs
    from ..training.storage import Folder
    from .runs_table import render_runs

    storage = Folder(resolve_path(options.storage, Path.cwd()))
    print(render_runs(list_runs(storage), as_json=options.json))


def report(options: argparse.Namespace) -> None:
    """Write a run's report anew."""
    from ..training.report import write_report
    from ..training.run_folder import REPORT_FILE, read_run
    from ..training.storage import Folder

    folder = Folder(resolve_path(options.run, Path.cwd()))
    if read_run(folder) is None:
        raise InputError(f"{folder} holds no run (it has no run.json)")
    write_report(folder)
    print(folder / REPORT_FILE)


def k8s_render(options: argparse.Namespace) -> None:
    """Write a recipe as a RayJob."""
    from ..training.errors import InputError
    from .kubernetes import Target, render

    target = Target(options.overlay, options.namespace, options.image, options.memory)
    text = render(load_recipe(options.recipe, tuple(options.overrides)), target)
    if options.to is None:
        print(text, end="")
        return
    try:
        options.to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to {options.to}: cannot write the file: {error.strerror}") from None


def schema(_: argparse.Namespace) -> None:
    """Print the recipe's JSON schema."""
    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _recipe(options: argparse.Namespace) -> Recipe:
    local = ("scale.workers=0",) if options.local else ()
    return load_recipe(options.recipe, (*options.overrides, *local))


@contextmanager
def _ray(recipe: Recipe, options: argparse.Namespace) -> Iterator[None]:
    """Ray where the recipe has workers; what bfloat16 on a CPU needs, in any case."""
    from .environment import worker_environment

    env = worker_environment(recipe)
    with ExitStack() as stack:
        if recipe.scale.workers:
            from .ray_session import ray_session

            print("starting Ray", file=sys.stderr)
            needed = recipe.scale.workers * recipe.scale.cpus_per_worker + 2
            stack.enter_context(ray_session(needed, options.address, env, options.verbose))
        yield
