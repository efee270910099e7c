"""Ray for one command: a cluster started on this machine, or an existing one."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from .token import join_with_token, start_with_token

# Ray Train sets these for its processes. Set for all, they let a process that prepared data
# become a training worker without a restart.
_OF_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    # finray's driver watches for drained nodes itself.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# Set before Ray is imported, because it reads them then.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **_OF_TRAIN,
    # By default Ray's workers run at nice 15 and hardly train beside other processes.
    "RAY_worker_niceness": "0",
    # Prestarted workers lack the environment of finray's tasks and would stay unused.
    "RAY_prestart_worker_first_driver": "0",
}


def cluster_address(requested: str | None) -> str | None:
    """Address of the cluster to use: the requested one, else $RAY_ADDRESS, which jobs have.

    "local" stands for a cluster on this machine for this command alone; None for no cluster.
    """
    return requested or os.environ.get("RAY_ADDRESS")


@contextmanager
def ray_session(
    needed_cpus: int, address: str | None, env: dict[str, str], verbose: bool
) -> Iterator[None]:
    """Ray for as long as the context lasts.

    Args:
        needed_cpus: fewest logical CPUs of a cluster that is started here.
        address: a running cluster; None and "local" start one here.
        env: environment variables of all workers.
        verbose: print what workers print.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    where = address or "local"
    if where == "local":
        start_with_token()
    else:
        join_with_token(where)
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
