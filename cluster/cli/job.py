"""`finray job`: runs and sweeps as Ray jobs; one function a verb."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ...training.common.errors import InputError, RunError
from ...training.config.recipe import Recipe, load_recipe
from ...training.inspection import inspect_recipe
from ...tuning.plan import make_plan
from ...tuning.sweep import LoadedSweep, is_sweep, load_sweep, split_overrides
from ..jobs.client import ACTIVE, Cluster, Job, Submitted
from ..nodes.address import dashboard_address
from ..screens.runs import columns


def submit(options: argparse.Namespace) -> None:
    """Upload a recipe or a sweep with its files, and run it."""
    address = dashboard_address(options.address)
    what = _load_and_check(options)
    cluster = Cluster(address)
    submitted = cluster.submit(
        what,
        tuple(options.on_cluster),
        options.max_mib,
        options.python,
        options.wait_for_nodes,
        options.log_level,
        fresh=options.fresh,
        longer=options.longer,
    )
    job = submitted.job
    notices = [*submitted.notes, _what_happened(submitted)]
    if not options.quiet:
        print(*notices, sep="\n", file=sys.stderr)
    if options.wait and options.quiet:
        job = cluster.wait(job)
    elif options.wait:
        job = cluster.follow(job, sys.stderr.write)
    print(json.dumps(asdict(job), indent=2) if options.json else _line(job))
    if options.wait and job.status not in (*ACTIVE, "SUCCEEDED"):
        kind = InputError if job.exit_code == InputError.exit_code else RunError
        raise kind(f"{job.run} {job.status}; see finray job logs {job.run}")


def _what_happened(submitted: Submitted) -> str:
    job = submitted.job
    if submitted.is_new:
        return f"submitted {job.run}" + (f" again, as {job.id}" if job.attempt > 1 else "")
    if job.status in ACTIVE:
        return f"{job.run} is already {job.status.lower()}"
    return f"{job.run} has finished already; finray job fetch {job.run} gets its results"


def _load_and_check(options: argparse.Namespace) -> Recipe | LoadedSweep:
    """The recipe or sweep to run; its data is checked if it is on this machine."""
    is_here = not options.on_cluster
    if is_sweep(options.recipe):
        loaded = load_sweep(options.recipe, *split_overrides(options.overrides))
        if is_here:
            make_plan(loaded)
            inspect_recipe(loaded.recipe)
        return loaded
    recipe = load_recipe(options.recipe, tuple(options.overrides))
    if is_here:
        inspect_recipe(recipe)
    return recipe


def list_jobs(options: argparse.Namespace) -> None:
    """List the cluster's runs."""
    jobs = Cluster(dashboard_address(options.address)).jobs()
    if options.json:
        print(json.dumps([asdict(job) for job in jobs], indent=2))
    elif not jobs:
        print("no runs here yet")
    else:
        rows = [(job.run, job.status, job.id, job.storage) for job in jobs]
        print(columns([("run", "status", "job", "storage"), *rows], left_aligned=4))


def status(options: argparse.Namespace) -> None:
    """Print the state of a run's last attempt."""
    job = Cluster(dashboard_address(options.address)).job(options.name)
    print(json.dumps(asdict(job), indent=2) if options.json else _line(job))


def logs(options: argparse.Namespace) -> None:
    """Print what a run has printed; with --follow, until it ends."""
    cluster = Cluster(dashboard_address(options.address))
    job = cluster.job(options.name)
    if options.follow:
        cluster.follow(job, sys.stdout.write)
    else:
        sys.stdout.write(cluster.logs(job))


def stop(options: argparse.Namespace) -> None:
    """Let a run save a checkpoint and exit."""
    cluster = Cluster(dashboard_address(options.address))
    job = cluster.job(options.name)
    if not cluster.stop(job):
        print(f"{job.run} has already ended: {job.status}")
        return
    if not options.quiet:
        print("saving a checkpoint", file=sys.stderr)
    print(_line(cluster.wait(job)))


def fetch(options: argparse.Namespace) -> None:
    """Download a run's metrics, report and result."""
    cluster = Cluster(dashboard_address(options.address))
    job = cluster.job(options.name)
    target = options.to or Path("runs") / job.run
    names = cluster.fetch(job, target)
    print(f"{len(names)} files in {target}")


def _line(job: Job) -> str:
    message = f": {job.message}" if job.message and job.status not in ACTIVE else ""
    return f"{job.run} {job.status}{message}"
