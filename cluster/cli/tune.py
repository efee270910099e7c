"""`finray tune`: run a sweep, continue an unfinished one, or show one."""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...training.common.background import Stop
from ...training.common.errors import InputError
from ...training.common.storage import Folder
from ...training.config.paths import resolve_path
from ...training.config.recipe import Recipe
from ...training.config.sections import ScaleSettings
from ...training.config.user_code import try_import
from ...training.inspection import inspect_recipe
from ...training.records.run_folder import Record
from ...training.run import differences
from ...tuning.plan import make_plan
from ...tuning.resume import check_folder, describe
from ...tuning.sweep import LoadedSweep, load_sweep, split_overrides
from ...tuning.sweep_folder import read_sweep
from ..environment import worker_environment
from ..interrupts import graceful_interrupts
from ..launcher import prepare_early
from ..nodes.ray_session import cluster_address, ray_session
from ..preflight import try_running_cluster
from .screens.sweep import SweepLines, render_sweep

_UPDATE_SECONDS = 1.0


def tune(options: argparse.Namespace) -> None:
    """Search for good settings, continue an unfinished sweep, or show one."""
    words = options.sweep
    if words[0] == "show" and len(words) == 2:
        show_sweep(words[1], options)
    elif len(words) == 1:
        run_sweep(Path(words[0]), options)
    else:
        raise InputError(f"tune {' '.join(words)}: expected SWEEP, or show and SWEEP or its folder")


def run_sweep(path: Path, options: argparse.Namespace) -> None:
    """Search, or continue an unfinished sweep."""
    loaded = _load(path, options)
    plan = make_plan(loaded)
    inspect_recipe(plan.recipe)
    try_import(plan.recipe)

    record = check_folder(plan)
    done = record is not None and record["status"] == "finished"
    if record is None or not done or differences(record["settings"], describe(plan)):
        env = worker_environment(plan.recipe)
        stop = Stop()
        prepared = prepare_early(list(plan.data_recipes().values()))
        progress = SweepLines()
        progress.status("starting Ray")
        address = cluster_address(options.address)
        session = ray_session(_needed_cpus(plan.recipe.scale), address, env, options.verbose)
        # Ray takes SIGTERM for itself when it starts; a sweep that receives it must save first.
        with session, graceful_interrupts(stop):
            # Ray reads its environment when it is imported, so not before.
            from ...tuning.run import tune as run_to_the_end

            trial = _one_worker(plan.recipe)
            tried = try_running_cluster(trial, address, options.wait_for_nodes)
            prepared.result()
            record = run_to_the_end(plan, progress, stop, tried.worker_env)
    print(json.dumps(record, indent=2) if options.json else render_sweep(record, plan.folder))


def show_sweep(name: str, options: argparse.Namespace) -> None:
    """Print a sweep's table; on a terminal, update it while the sweep runs."""
    path = Path(name)
    if path.is_file():
        sweep = _load(path, options).sweep
        folder = Folder(sweep.storage) / sweep.name
    else:
        folder = Folder(resolve_path(name, Path.cwd()))
    record = _read(folder)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    console = Console()
    if not console.is_terminal or record["status"] != "running":
        print(render_sweep(record, folder))
        return
    with Live(console=console, auto_refresh=False) as live:
        while record["status"] == "running":
            live.update(Text(render_sweep(record, folder)), refresh=True)
            time.sleep(_UPDATE_SECONDS)
            record = _read(folder)
        live.update(Text(render_sweep(record, folder)), refresh=True)


def _load(path: Path, options: argparse.Namespace) -> LoadedSweep:
    own, of_recipe = split_overrides(options.overrides)
    bounds = [f"stop_when.{bound}" for bound in options.bounds]
    local = ["scale.workers=0", "scale.strategy=auto"] if options.local else []
    return load_sweep(path, (*own, *bounds), (*of_recipe, *local))


def _read(folder: Folder) -> Record:
    record = read_sweep(folder)
    if record is None:
        raise InputError(f"{folder} holds no sweep")
    return record


def _one_worker(recipe: Recipe) -> Recipe:
    """The recipe with one worker if it has none: a trial takes that much of the cluster."""
    if recipe.scale.most_workers:
        return recipe
    scale = recipe.scale.model_copy(update={"workers": 1})
    return recipe.model_copy(update={"scale": scale})


def _needed_cpus(scale: ScaleSettings) -> int:
    """CPUs of one trial: its workers, and Ray Train's driver and its helpers if it starts them."""
    if scale.most_workers <= 1:
        return scale.cpus_per_worker
    return scale.most_workers * scale.cpus_per_worker + 2
