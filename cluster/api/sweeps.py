"""One sweep, from Python."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...training.common.background import Stop
from ...training.config.recipe import Recipe
from ...training.config.sections import ScaleSettings
from ...training.config.user_code import try_import
from ...training.inspection import check_log, inspect_recipe
from ...training.records.resume import differences
from ...tuning.plan import Plan, make_plan
from ...tuning.progress import SweepProgress
from ...tuning.resume import check_folder, check_writable, describe
from ...tuning.sweep import LoadedSweep, split_overrides
from ...tuning.sweep import load_sweep as load
from ...tuning.untried import Untried
from ..environment import worker_environment
from ..interrupts import graceful_interrupts
from ..launcher import prepare_early
from ..nodes.ray_session import cluster_address, ray_session
from ..preflight import try_running_cluster
from ..screens.sweep import SweepLines
from .outlook import examine
from .recipes import LOCAL, Changes, SweepSource, as_changes, prepare_process, source_of
from .results import SweepResult


def tune(
    sweep: SweepSource,
    changes: Changes = (),
    *,
    stop_when: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
    wait_for_nodes: float = 0.0,
    verbose: bool = False,
    quiet: bool = False,
) -> SweepResult:
    """Search for good settings, or continue an unfinished search; blocks until it ends.

    Args:
        sweep: a YAML file, or the settings as a mapping, whose key `recipe` holds or names the
            base recipe.
        changes: values that override the sweep's, by dotted key; `recipe.KEY` changes its base
            recipe.
        stop_when: conditions that end it early, such as `trials_without_gain=10`.
        local: one worker a trial, on this machine.
        address: a Ray cluster, `HOST:PORT`. By default a Ray that this process has initialised,
            then $FINRAY_ADDRESS and $RAY_ADDRESS, else Ray is started on this machine. A Ray of the
            caller's is used and not stopped.
        wait_for_nodes: seconds to wait for an autoscaler to add missing nodes.
        verbose: show what the workers print.
        quiet: show no progress.

    Raises:
        InputError: the sweep, its recipe or the data is wrong.
        RunError: no trial succeeded.
        Interrupted: Ctrl-C or a notebook's stop button; the same call continues.
    """
    prepare_process()
    plan = make_plan(read_sweep_source(sweep, changes, stop_when, local=local))
    _try_imports(plan)
    inspect_recipe(plan.recipe)
    check_log(plan.recipe)

    record = check_folder(plan)
    done = record is not None and record["status"] == "finished"
    if done and record is not None and not differences(record["settings"], describe(plan)):
        return SweepResult(plan.folder)
    check_writable(plan)
    env = worker_environment(plan.recipe)
    stop = Stop()
    prepared = prepare_early(list(plan.data_recipes().values()))
    progress = SweepProgress() if quiet else SweepLines()
    progress.status("starting Ray")
    where = cluster_address(address)
    session = ray_session(_needed_cpus(plan.recipe.scale), where, env, verbose)
    # Ray takes SIGTERM for itself when it starts; a sweep that receives it must save first.
    with session, graceful_interrupts(stop):
        # Ray reads its environment when it is imported, so not before.
        from ...tuning.run import tune as run_to_the_end

        # Nodes with GPUs are waited for last: what is refused needs none.
        prepared.result()
        tried = try_running_cluster(_trial(plan), where, wait_for_nodes, progress)
        run_to_the_end(plan, progress, stop, tried.worker_env, tried.room)
    return SweepResult(plan.folder)


def check_sweep(
    sweep: SweepSource, changes: Changes = (), *, local: bool = False
) -> tuple[Recipe, dict[str, Any]]:
    """What a sweep would do, without starting it.

    Returns:
        The recipe of a trial, and plain values: those of `examine`, and `sweep`.

    Raises:
        InputError: the sweep cannot run; with place, key and remedy.
    """
    plan = make_plan(read_sweep_source(sweep, changes, (), local=local))
    record = check_folder(plan)
    check_writable(plan)
    facts = {
        "trials": plan.sweep.trials,
        "settings": Untried(plan.space).valid,
        "sampler": plan.sweep.sampler,
        "objectives": [asdict(metric) for metric in plan.metrics],
    }
    state = "new" if record is None else f"{record['status']} before; the same command continues it"
    _try_imports(plan)
    outlook = examine(plan.recipe, fresh=True)
    own = {"name": plan.sweep.name, "folder": plan.folder.uri, "state": state, "sweep": facts}
    return _trial(plan), outlook | own


def read_sweep_source(
    sweep: SweepSource, changes: Changes, stop_when: Sequence[str], *, local: bool
) -> LoadedSweep:
    """A valid sweep with its changes; see `tune`.

    Raises:
        InputError: with place and key of every fault.
    """
    own, of_recipe = split_overrides(as_changes(changes))
    bounds = [f"stop_when.{bound}" for bound in stop_when]
    return load(source_of(sweep), [*own, *bounds], [*of_recipe, *(LOCAL if local else ())])


def _try_imports(plan: Plan) -> None:
    """Import the user's code once, also that of stages and rewards which only some trials have."""
    tried: set[str] = set()
    for recipe in (plan.recipe, *plan.data_recipes().values()):
        try_import(recipe, tried)


def _trial(plan: Plan) -> Recipe:
    """What a trial takes of the cluster: the sweep's storage, and at least one worker."""
    recipe = plan.recipe.model_copy(update={"storage": plan.sweep.storage})
    if recipe.scale.most_workers:
        return recipe
    scale = recipe.scale.model_copy(update={"workers": 1})
    return recipe.model_copy(update={"scale": scale})


def _needed_cpus(scale: ScaleSettings) -> int:
    """CPUs of one trial: its workers, and Ray Train's driver and its helpers if it starts them."""
    if scale.most_workers <= 1:
        return scale.cpus_per_worker
    return scale.most_workers * scale.cpus_per_worker + 2
