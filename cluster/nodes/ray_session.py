"""Ray for one command: a cluster started on this machine, or an existing one."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ...training.common.errors import InputError
from ...training.common.logs import chosen_level
from ...training.common.scratch import remove_leftovers, scratch_folder
from .address import ray_address, require_answer
from .ray_start import START_VARIABLES, start_ray
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


_INITIALISED = "auto"
"""The address that stands for a Ray which the caller has initialised in this process."""


def cluster_address(requested: str | None) -> str | None:
    """Address of the cluster to use: the requested one, else that of a Ray which the caller has
    initialised in this process, else $FINRAY_ADDRESS, else $RAY_ADDRESS, which jobs have.

    "local" stands for a cluster on this machine for this command alone; None for no cluster.
    """
    if requested is None and is_initialised():
        return _INITIALISED
    return ray_address(requested) or os.environ.get("RAY_ADDRESS")


def is_initialised() -> bool:
    """True if this process has connected to Ray; Ray is not imported to find out."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


@contextmanager
def ray_session(
    needed_cpus: int, address: str | None, env: dict[str, str], verbose: bool
) -> Iterator[None]:
    """Ray for as long as the context lasts; one that the caller has initialised is used, and left
    as it is.

    Args:
        needed_cpus: fewest logical CPUs of a cluster that is started here.
        address: a running cluster; None and "local" start one here.
        env: environment variables of all workers.
        verbose: print what workers print.

    Raises:
        InputError: the caller has initialised another Ray than the requested one, or none answers
            at the address.
        RunError: Ray does not start here.
    """
    if is_initialised():
        if address not in (None, _INITIALISED):
            raise InputError(
                f"address {address}: this process has initialised Ray already; leave out the "
                "address to use that one, or call ray.shutdown() first"
            )
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    where = address or "local"
    if where == "local":
        for name, value in START_VARIABLES.items():
            os.environ.setdefault(name, value)
        start_with_token()
    else:
        join_with_token(where)
        require_answer(where)
    import ray

    level = chosen_level() or (logging.INFO if verbose else logging.ERROR)
    logging.getLogger("ray").setLevel(level)
    variables = {**env, **{name: os.environ[name] for name in _OF_TRAIN}}
    cluster: AbstractContextManager[dict[str, Any]] = nullcontext({})
    connect = ray.init
    if where == "local":
        cluster, connect = _own_cluster(needed_cpus), start_ray
    with cluster as options:
        try:
            connect(
                address=where,
                runtime_env={"env_vars": variables},
                log_to_driver=verbose,
                logging_level=level,
                **options,
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _own_cluster(needed_cpus: int) -> Iterator[dict[str, Any]]:
    """Options of a cluster of this process; nothing of its session stays on this machine."""
    options = {"num_cpus": max(os.cpu_count() or 1, needed_cpus), "include_dashboard": False}
    try:
        with scratch_folder("ray", is_short=True) as folder:
            yield {**options, "_temp_dir": str(folder)}
    finally:
        remove_leftovers()  # of workers, which Ray has killed
