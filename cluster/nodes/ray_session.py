"""Opening Ray for a command: a cluster of this machine's own, or one that is there already."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .token import enter_cluster, enter_own_cluster

# Ray Train sets them for its processes. Where all others have them too, a process that prepared
# data goes on as one that trains.
_OF_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # finray's driver looks for drained nodes itself.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Set before Ray is imported: it reads them then.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **_OF_TRAIN,
    # Ray runs its workers at nice 15: next to anything else they would hardly train.
    "RAY_worker_niceness": "0",
    # Those have another environment than finray's tasks, and would be started for nothing.
    "RAY_prestart_worker_first_driver": "0",
}


def cluster_address(asked: str | None) -> str | None:
    """Of the cluster that a command is for: the one asked for, else $RAY_ADDRESS, as in a job.

    "local" is a cluster of this machine's own, for this command alone; None is no cluster.
    """
    return asked or os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_session(
    needed_cpus: int, address: str | None, env: dict[str, str], verbose: bool
) -> Iterator[None]:
    """Ray for as long as the context lasts.

    Args:
        needed_cpus: logical CPUs that a cluster of this machine's own must have at least.
        address: a running cluster; None and "local" start one here.
        env: environment variables of all workers.
        verbose: pass on what workers print.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    where = address or "local"
    if where == "local":
        enter_own_cluster()
    else:
        enter_cluster(where)
    import ray

    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    options = {}
    if where == "local":
        cpus = max(os.cpu_count() or 1, needed_cpus)
        options = {"num_cpus": cpus, "include_dashboard": False}
    ray.init(
        address=where,
        runtime_env={"env_vars": {**env, **{name: os.environ[name] for name in _OF_TRAIN}}},
        log_to_driver=verbose,
        logging_level=level,
        **options,
    )
    try:
        yield
    finally:
        ray.shutdown()
