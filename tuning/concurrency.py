"""How many trials fit on the cluster at the same time, and which resources each one reserves."""

from collections.abc import Sequence

from ..training.common.errors import InputError
from ..training.config.sections import ScaleSettings
from ..training.launch.resources import Resources, cluster_nodes, fitting_workers, worker_request

_DRIVER_CPUS = 0.1
"""CPUs of a trial process that only starts and follows Ray Train workers; Ray Tune rejects 0."""


def slot_resources(scale: ScaleSettings) -> dict[str, float]:
    """Resources that Ray Tune reserves for the process of one trial.

    With several workers, Ray Train reserves the resources of the workers itself.
    """
    if scale.most_workers > 1:
        return {"CPU": _DRIVER_CPUS}
    return worker_request(scale, cluster_nodes()).worker


def decide_concurrency(requested: int | str, scale: ScaleSettings, place: str) -> int:
    """Number of trials that run at the same time on the initialised Ray.

    Args:
        requested: the sweep's setting.
        scale: workers and resources of a trial.
        place: file:line of the setting, for messages.

    Raises:
        InputError: the cluster cannot hold that many, or not even one.
    """
    nodes = cluster_nodes()
    most = trials_that_fit(scale, nodes)
    if requested == "auto" and most:
        return most
    if most < 1 or int(requested) > most:
        request = worker_request(scale, nodes)
        gpus = f" and {request.gpus:g} GPU" if request.gpus else ""
        workers = f"{request.min} x " if request.min > 1 else ""
        raise InputError(
            f"{place}: concurrency: {requested} trials of {workers}{request.cpus:g} CPU{gpus} each "
            f"are requested, but the cluster of {len(nodes)} nodes holds {most} at a time; lower "
            "concurrency or scale, or add nodes"
        )
    return int(requested)


def trials_that_fit(scale: ScaleSettings, nodes: Sequence[Resources]) -> int:
    """Number of trials that fit on the nodes, each with its maximum number of workers.

    If not even one fits, each trial counts with its minimum number of workers.
    """
    request = worker_request(scale, nodes)
    if request.max <= 1:
        return fitting_workers(request, nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    trials = 0
    for workers in (request.max, request.min):
        with_driver = int(cpus / (workers * request.cpus + _DRIVER_CPUS))
        trials = trials or min(fitting_workers(request, nodes) // workers, with_driver)
    return trials
