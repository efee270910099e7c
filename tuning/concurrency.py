"""How many trials a cluster holds at a time, and what each takes of it."""

from collections.abc import Sequence

from ..training.common.errors import InputError
from ..training.config.sections import ScaleSettings
from ..training.launch.resources import Resources, cluster_nodes, fitting_workers, worker_request

_DRIVER_CPUS = 0.1
"""Of a trial that only starts and follows Ray Train workers; Ray Tune does not take 0."""


def slot_resources(scale: ScaleSettings) -> dict[str, float]:
    """What a trial's own process takes."""
    if scale.most_workers > 1:
        return {"CPU": _DRIVER_CPUS}
    return worker_request(scale, cluster_nodes()).worker


def decide_concurrency(requested: int | str, scale: ScaleSettings) -> int:
    """Trials at a time on the initialised Ray.

    Raises:
        InputError: where it can never hold so many, or not even one.
    """
    nodes = cluster_nodes()
    most = trials_held(scale, nodes)
    if requested == "auto" and most:
        return most
    if most < 1 or int(requested) > most:
        request = worker_request(scale, nodes)
        gpus = f" and {request.gpus:g} GPU" if request.gpus else ""
        workers = f"{request.min} x " if request.min > 1 else ""
        raise InputError(
            f"concurrency: {requested} trials of {workers}{request.cpus:g} CPU{gpus} each are "
            f"requested, and the cluster of {len(nodes)} nodes holds {most} at a time; lower "
            "concurrency or scale, or add nodes"
        )
    return int(requested)


def trials_held(scale: ScaleSettings, nodes: Sequence[Resources]) -> int:
    """How many trials the nodes hold at a time, each with as many workers as it may have."""
    request = worker_request(scale, nodes)
    if request.max <= 1:
        return fitting_workers(request, nodes)
    have = sum(node.get("CPU", 0.0) for node in nodes)
    trials = 0
    for workers in (request.max, request.min):
        with_driver = int(have / (workers * request.cpus + _DRIVER_CPUS))
        trials = trials or min(fitting_workers(request, nodes) // workers, with_driver)
    return trials
